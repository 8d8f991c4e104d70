r"""What kind of thing an answer is: a number, a list, a set, a tuple, an interval, a matrix, ...

`read_answer` takes an answer in the common notation of `notation.normalise` apart from the
outside in; the innermost pieces are expressions.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from headwater.verify.arithmetic import NotRational, Undefined, mentions, rational
from headwater.verify.environments import read_environment
from headwater.verify.expression import (
    Expression,
    Number,
    Operation,
    Symbol,
    read_expression,
)
from headwater.verify.kinds import (
    Answer,
    Based,
    Bracketed,
    Labelled,
    Listing,
    Matrix,
    Opaque,
    Ratio,
    Scalar,
    Text,
    Union,
)
from headwater.verify.numerics import roughly_equal
from headwater.verify.relations import interval, read_member, read_relation
from headwater.verify.splitting import (
    check_nesting,
    encloses,
    is_label,
    split_at,
    split_at_signs,
    without_outer_braces,
)
from headwater.verify.tokens import MAX_CHARACTERS, PastLimits, Unreadable
from headwater.verify.units import split_unit
from headwater.verify.words import (
    AND_OR,
    NUMBER_WORDS,
    TEXT,
    read_choice,
    read_clock,
    read_words,
    text_key,
    without_lead_in,
    words_of,
)

_MAX_ITEMS = 64
_LONGEST_NUMERAL = 100
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq|thickapprox)(?![a-z])")
_ABOUT = re.compile(r"^\\sim(?![a-z])")
_MEMBER = re.compile(r"\\in(?![a-z])")
_UNION = re.compile(r"\\cup(?![a-z])|(?<=[)\]}]) ?U ?(?=[(\[\\{])")
_BASED = re.compile(
    r"(-?) ?\(? ?(?:\\text ?\{)? ?(\w*\d[\w.]*|[A-Za-z]\w+) ?\}? ?\)?"
    r" ?(?:_ ?\{? ?\(?|\(?(?:\\text ?\{ ?)?\(?(?:in )?base[ -])"
    r" ?(?:\} ?|\\text ?\{)? ?(?:base )?(\d+|[a-z]+)[ })]*"
)
_ALL_REALS = re.compile(
    r"\\mathbb ?(?:\{R\}|R)|(?:\\text ?\{)? ?all real(?: number)?s ?\}?", re.IGNORECASE
)
_ALL_BUT = re.compile(
    r"(?:\\mathbb ?(?:\{R\}|R)|R) ?(?:\\setminus(?![a-z])|\\backslash(?![a-z])|-) ?\\\{(.+)\\\}"
)
_TEXT_LIST = re.compile(r"\\text ?\{((?: ?[A-Za-z\d] ?(?:,|;|and|or|(?=\})))+)\}")


def read_answer(text: str) -> Answer:
    """Return what an answer in common notation is; raise PastLimits if it is too long or deep."""
    if len(text) > MAX_CHARACTERS:
        raise PastLimits("too long")
    check_nesting(text)
    return _read(text.strip())


def _read(text: str) -> Answer:
    text = without_lead_in(without_outer_braces(text))
    if _ALL_REALS.fullmatch(text):
        return interval(None, "(", None, ")")
    for reader in (
        _read_choice, read_clock, _read_environment, _read_based, read_words, _read_approximation,
        _read_all_but, _read_list, _read_member, _read_union, _read_relation, _read_brackets,
        _read_ratio,
    ):  # fmt: skip
        answer = reader(text)
        if answer is not None:
            return answer
    return _read_scalar(text)


def _read_choice(text: str) -> Answer | None:
    return read_choice(text, _read)


def _read_environment(text: str) -> Answer | None:
    return read_environment(text, _read)


def _read_member(text: str) -> Answer | None:
    return read_member(text, _read)


def _read_relation(text: str) -> Answer | None:
    return read_relation(text, _read)


def label_free(answer: Answer) -> Answer:
    """The value of a labelled answer; any other answer as it is."""
    return label_free(answer.value) if isinstance(answer, Labelled) else answer


def _read_approximation(text: str) -> Answer | None:
    """An exact value with its rounding after it is that value; a name before one is a label."""
    sides = split_at(_ABOUT.sub(r"\\approx", text), _APPROXIMATELY)
    if len(sides) < 2:
        return None
    if not sides[0] or is_label(sides[0]):
        return _read(sides[1]) if len(sides) == 2 else Opaque(text)
    exact = _read(sides[0])
    value = label_free(exact)
    for side in sides[1:]:
        rounded = _read(side)
        if not isinstance(value, Scalar) or not isinstance(rounded, Scalar):
            return Opaque(text)
        if not roughly_equal(value.tree, rounded.tree):
            return Opaque(text)
    return exact


def _read_list(text: str) -> Answer | None:
    """Several answers; alternatives that are intervals are a union, groups at `;` stay together."""
    text = _TEXT_LIST.sub(lambda piece: f" {piece.group(1)} ", text)
    groups = split_at_signs(text, ";")
    if len(groups) > 1 and all(len(split_at_signs(group, ",")) > 1 for group in groups):
        return _listing([_read(group.strip()) for group in groups])
    separators: list[str] = []
    pieces: list[str] = []
    for place, part in enumerate(split_at_signs(text, ",;")):
        words = split_at(part, AND_OR, separators)
        if len(words) > 1 and not (words[-1] and (words[0] or place)):
            return Opaque(text)
        pieces += words
    if len(pieces) < 2 and "\\pm" not in text and "\\mp" not in text:
        return None
    items: list[Answer] = []
    for piece in filter(str.strip, pieces):
        items += [_read(branch) for branch in _plus_and_minus(piece.strip())]
    if len(items) < 2:
        return items[0] if items else None
    if separators and all(word == "or" for word in separators):
        return _alternatives(items) or _listing(items)
    if separators == ["and"] and len(items) == 2:
        return _intersection(*items) or _listing(items)
    return _listing(items)


def _listing(items: list[Answer]) -> Listing:
    if len(items) > _MAX_ITEMS:
        raise PastLimits("too many items")
    return Listing(tuple(items))


def _alternatives(items: list[Answer]) -> Answer | None:
    """Intervals joined by "or" are their union; points joined by it are not."""
    parts = [label_free(item) for item in items]
    labels = {item.label for item in items if isinstance(item, Labelled)}
    if len(labels) > 1 or not all(isinstance(part, Bracketed | Union) for part in parts):
        return None
    if all(map(_point, parts)) and not all(isinstance(item, Labelled) for item in items):
        return None
    union = Union(tuple(_flat_union(parts)))
    return Labelled(min(labels), union, None) if labels else union


def _intersection(one: Answer, other: Answer) -> Answer | None:
    """x > 1 and x < 3 leave the interval between."""
    match one, other:
        case Labelled(label, Bracketed((low, upper), above)), Labelled(
            name, Bracketed((lower, high), below)
        ) if label == name:
            if _is_infinite(upper) and _is_infinite(lower):
                return Labelled(label, Bracketed((low, high), above[0] + below[1]), None)
            if _is_infinite(low) and _is_infinite(high):
                return Labelled(label, Bracketed((lower, upper), below[0] + above[1]), None)
    return None


def _point(answer: Answer) -> bool:
    if not isinstance(answer, Bracketed) or answer.brackets != "()":
        return False
    return not any(map(_is_infinite, answer.items))


def _is_infinite(end: Answer) -> bool:
    return isinstance(end, Scalar) and _infinite(end.tree)


def _infinite(tree: Expression) -> bool:
    if isinstance(tree, Operation):
        return tree.operator == "neg" and _infinite(tree.operands[0])
    return tree == Symbol("infty")


def _plus_and_minus(text: str) -> list[str]:
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [upper, lower]


def _read_union(text: str) -> Answer | None:
    """A union; one of finite sets is the set of all their elements."""
    sides = split_at(text, _UNION)
    if len(sides) < 2:
        return None
    parts = [_read(side) for side in sides]
    sets = [part for part in parts if isinstance(part, Listing) and part.is_set]
    if len(sets) == len(parts):
        return Listing(tuple(item for part in sets for item in part.items), is_set=True)
    return Union(tuple(_flat_union(parts)))


def _read_all_but(text: str) -> Answer | None:
    """All reals but a few rational numbers, as the union of what is left between them."""
    match = _ALL_BUT.fullmatch(text)
    holes = _read_list(match.group(1)) or _read(match.group(1)) if match else None
    items = holes.items if isinstance(holes, Listing) else (holes,)
    trees = [item.tree for item in items if isinstance(item, Scalar)]
    if len(trees) < len(items):
        return None
    try:
        ends = [Scalar(Number(value)) for value in sorted({rational(tree) for tree in trees})]
    except (NotRational, Undefined):
        return None
    bounds = itertools.pairwise([None, *ends, None])
    return Union(tuple(interval(low, "(", high, ")") for low, high in bounds))


def _flat_union(parts: list[Answer]) -> list[Answer]:
    flat: list[Answer] = []
    for part in parts:
        flat += part.parts if isinstance(part, Union) else [part]
    return flat


def _read_brackets(text: str) -> Answer | None:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_set(text[2:-2].strip())
    if not text or text[0] not in "([" or text[-1] not in ")]" or not encloses(text):
        return None
    inside = split_at_signs(text[1:-1], ",;")
    if len(inside) < 2:
        return None
    items = tuple(_read(item.strip()) for item in inside)
    if text[0] == "[" and all(isinstance(i, Bracketed) and i.brackets == "[]" for i in items):
        return Matrix(tuple(item.items for item in items if isinstance(item, Bracketed)))
    return Bracketed(items, text[0] + text[-1])


def _read_set(inside: str) -> Answer | None:
    if not inside:
        return Scalar(Symbol("emptyset"))
    builder = split_at_signs(inside, "|:")
    if len(builder) == 2:
        name, *domain = split_at(builder[0], _MEMBER)
        if not is_label(name) or (domain and not _ALL_REALS.fullmatch(domain[0])):
            return None
        condition = _read(builder[1].strip())
        return label_free(condition) if isinstance(condition, Labelled) else Opaque(inside)
    if len(builder) > 2:
        return None
    items = tuple(
        _read(branch)
        for item in split_at_signs(inside, ",;")
        for branch in _plus_and_minus(item.strip())
        if branch
    )
    return Listing(items, is_set=True)


def _read_based(text: str) -> Answer | None:
    numeral = _BASED.fullmatch(text) if len(text) <= _LONGEST_NUMERAL else None
    if numeral is None or text.count("(") != text.count(")"):
        return None
    sign, digits, name = numeral.groups()
    base = int(name) if name.isdigit() and len(name) < 3 else NUMBER_WORDS.get(name)
    if base is None or not 2 <= base <= 36 or not all(_is_digit(d, base) for d in digits):
        return None
    return Based(sign + (digits.lower().lstrip("0") or "0"), base)


def _is_digit(digit: str, base: int) -> bool:
    return digit == "." or (digit.isascii() and digit.isalnum() and int(digit, 36) < base)


def _read_ratio(text: str) -> Answer | None:
    parts = split_at_signs(text, ":")
    if len(parts) < 2:
        return None
    return Ratio(tuple(_read(part.strip()) for part in parts))


def _read_scalar(text: str) -> Answer:
    measured = split_unit(text)
    body = TEXT.sub(_plain_piece, measured.body)
    if not body.strip():
        return Opaque(text)
    try:
        tree = read_expression(without_outer_braces(body))
    except Unreadable:
        flat = TEXT.sub(r" \1 ", text)
        words = flat != text or words_of(flat)
        return Text(text_key(flat)) if words and text_key(flat) else Opaque(text)
    if mentions(tree, "infty") and not _infinite(tree):
        return Opaque(text)
    if measured.multiplier != 1:
        tree = Operation("*", (tree, Number(Fraction(measured.multiplier))))
    return Scalar(tree, measured.unit)


def _plain_piece(piece: re.Match[str]) -> str:
    r"""`\text{C}` and `\text{(C)}` are the letter; longer words stay text."""
    inside = piece.group(1).strip()
    return f" {inside} " if len(inside.strip("() ")) <= 1 or inside.isdigit() else piece.group()
