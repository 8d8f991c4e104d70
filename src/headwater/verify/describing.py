"""Answers in words: what was read from a completion and from a gold answer, for `--explain`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headwater.types import Label
from headwater.verify.answers import read_answer
from headwater.verify.equivalence import stated_answer
from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.extract import ANSWER_FORMS, after_thinking, extract_answer
from headwater.verify.grading import Grade
from headwater.verify.kinds import (
    Answer,
    Based,
    Bracketed,
    Choice,
    Clock,
    Labelled,
    Listing,
    Matrix,
    Opaque,
    Ratio,
    Relation,
    Scalar,
    Text,
    Union,
)
from headwater.verify.notation import normalise
from headwater.verify.tokens import PastLimits

_LONGEST = 200
_FORMS = {
    "boxed": r"the last complete \boxed{}",
    "hash": "the last line with ####",
    "answer_is": 'the last "answer is"',
}


def explain_grade(completion: str, label: Label, grade: Grade) -> dict[str, str]:
    """What was done with one completion, step by step: heading -> text, in order."""
    steps = {"thinking": _thinking(completion)}
    if grade.extracted is None:
        steps["answer"] = "none was read"
    else:
        steps["answer"] = f"{_short(grade.extracted)}  ({_found_in(completion, grade.extracted)})"
        steps["read as"] = describe(grade.extracted)
    if label.answer:
        steps["gold"] = _short(label.answer)
        steps["gold read as"] = describe(stated_answer(label.answer))
    steps["verdict"] = f"{grade.verdict}: {grade.how}"
    return {name: text for name, text in steps.items() if text}


def describe(answer: str) -> str:
    r"""What kind of thing an answer is and what its parts are.

    >>> describe(r"x = \frac{1}{2} \text{ cm}"), describe("(0, 1]")
    ('x = 1/2 cm: a value under a name', '(0, 1]: an interval')
    """
    try:
        read = read_answer(normalise(answer))
    except PastLimits as error:
        return f"not read: {error}"
    return f"{_short(_spelled(read))}: {_kind(read)}"


def _thinking(completion: str) -> str:
    spoken = after_thinking(completion)
    if spoken is None:
        return "left open, so that nothing counts as an answer"
    skipped = len(completion) - len(spoken)
    return f"the first {skipped} characters, which do not count" if skipped else ""


def _found_in(completion: str, extracted: str) -> str:
    for form in ANSWER_FORMS:
        if extract_answer(completion, form) == extracted:
            return f"from {_FORMS.get(form, form)}"
    return "from the completion"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _kind(answer: Answer) -> str:
    if isinstance(answer, Scalar):
        return "a number" if isinstance(answer.tree, Number) else "an expression"
    if isinstance(answer, Listing):
        return "a set" if answer.is_set else "several values, in no order"
    if isinstance(answer, Bracketed):
        mixed = answer.brackets in ("(]", "[)")
        return "an interval" if mixed else "a tuple, point or interval"
    return _KINDS[type(answer)]


_KINDS: dict[type, str] = {
    Union: "a union of sets",
    Matrix: "a matrix",
    Relation: "an equation or inequality",
    Labelled: "a value under a name",
    Ratio: "a ratio",
    Based: "a numeral with its base",
    Choice: "a lettered choice and what it says",
    Clock: "a time of day",
    Text: "words",
    Opaque: "mathematics for the algebra system",
}


def _spelled(answer: Answer) -> str:
    match answer:
        case Scalar(tree, unit):
            return f"{_outermost(tree)} {unit}".strip()
        case Listing(items, is_set):
            return f"{{{_joined(items)}}}" if is_set else _joined(items)
        case Bracketed(items, brackets):
            return f"{brackets[0]}{_joined(items)}{brackets[1]}"
        case Union(parts):
            return _joined(parts, " U ")
        case Matrix(rows):
            return f"[{'; '.join(_joined(row) for row in rows)}]"
        case Relation(sides, operators):
            pieces = [_outermost(sides[0])]
            for operator, side in zip(operators, sides[1:], strict=True):
                pieces += [operator, _outermost(side)]
            return " ".join(pieces)
        case Labelled(label, value):
            return f"{label} = {_spelled(value)}"
        case Ratio(items):
            return _joined(items, " : ")
        case Based(digits, base):
            return f"{digits} in base {base}"
        case Choice(letter, content):
            return f"{letter}: {_spelled(content)}"
        case Clock(hour, minute, second, half):
            return f"{hour}:{minute:02}:{second:02} {half and half + 'm'}".strip()
        case Text(key):
            return key
        case Opaque(text):
            return text


def _joined(items: Iterable[Answer], between: str = ", ") -> str:
    return between.join(map(_spelled, items))


def _outermost(tree: Expression) -> str:
    text = _infix(tree)
    bracketed = isinstance(tree, Operation) and tree.operator in ("+", "*", "^")
    return text[1:-1] if bracketed else text


def _infix(tree: Expression) -> str:
    if isinstance(tree, Number):
        return str(tree.value)
    if isinstance(tree, Symbol):
        return tree.name
    parts = [_infix(operand) for operand in tree.operands]
    if tree.operator == "+":
        return f"({' + '.join(parts)})"
    if tree.operator == "*":
        return f"({_product(tree.operands)})"
    if tree.operator == "^":
        return f"({' ^ '.join(parts)})"
    if tree.operator == "neg":
        return f"-{parts[0]}"
    if tree.operator == "inv":
        return f"1/{parts[0]}"
    return f"{parts[0]}!" if tree.operator == "!" else f"{tree.operator}({', '.join(parts)})"


def _product(factors: Sequence[Expression]) -> str:
    """`a * b/c`: what is divided by follows a stroke."""
    text = _infix(factors[0])
    for factor in factors[1:]:
        if isinstance(factor, Operation) and factor.operator == "inv":
            text += f"/{_infix(factor.operands[0])}"
        else:
            text += f" * {_infix(factor)}"
    return text
