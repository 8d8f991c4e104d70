r"""Is an answer the gold answer? Text and exact arithmetic first; algebra only where they agree.

`compare` runs in the caller's process, does a bounded amount of work and never raises for what a
model wrote. Where it cannot decide it says so (`needs_algebra`), and `algebra.settle` does in a
killable worker. Equality is exact: no tolerance, and a thing is equal only to its own kind (a
set is no tuple, an open interval no closed one, an equation no number).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from headwater.types import Verdict
from headwater.verify import values
from headwater.verify.answers import label_free, read_answer, text_key
from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.extract import extract_answer
from headwater.verify.kinds import (
    Answer,
    Based,
    Bracketed,
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
from headwater.verify.opaque import is_for_algebra
from headwater.verify.tokens import PastLimits, TooLarge
from headwater.verify.units import PERCENT, compatible

MAX_ANSWER_CHARACTERS = 50_000
_PROSE_CHARACTERS = 200
_PLAIN_NUMBER = re.compile(r"([+-]?) ?(\d+|\d{1,3}(?:,\d{3})+)?(?:\.(\d*))?")
_PERCENT = Number(Fraction(1, 100))


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict and how it was reached; with `needs_algebra` it stands until algebra is done."""

    verdict: Verdict
    how: str
    needs_algebra: bool = False

    @staticmethod
    def of(equal: bool, how: str) -> Finding:
        """CORRECT or INCORRECT."""
        return Finding(Verdict.CORRECT if equal else Verdict.INCORRECT, how)


Prover = Callable[[Expression, Expression], bool | None]
OpaqueJudge = Callable[[], bool | None]


def same_text(answer: str, gold: str) -> bool:
    r"""Whether two answers are the same letters once `$` and spacing around them are dropped.

    >>> same_text(" $7$ ", "7"), same_text("7.0", "7")
    (True, False)
    """
    return _bare(answer) == _bare(gold)


def compare(
    answer: str,
    gold: str,
    prove: Prover = values.equal,
    judge_opaque: OpaqueJudge = lambda: None,
) -> Finding:
    """Compare an extracted answer with a gold answer.

    `prove` decides about two expressions and `judge_opaque` about the whole pair where one
    of the two cannot be read; both return None for not knowing.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Finding(Verdict.UNPARSEABLE, f"longer than {MAX_ANSWER_CHARACTERS} characters")
    numbers = _plain_number(answer), _plain_number(stated_answer(gold))
    if numbers[0] and numbers[1]:
        return Finding.of(numbers[0] == numbers[1], "compared as plain numbers, digit by digit")
    one, other = normalise(answer), normalise(stated_answer(gold))
    if one and _spelling(one) == _spelling(other):
        return Finding.of(True, "written the same")
    if not one:
        return Finding(Verdict.UNPARSEABLE, "nothing is left once spacing is dropped")
    try:
        finding, met_opaque = _compare_read(read_answer(one), read_answer(other), prove)
    except TooLarge as error:
        return Finding(Verdict.TIMEOUT, f"would run past its limits: {error}")
    except PastLimits as error:
        return Finding(Verdict.UNPARSEABLE, f"cannot be read: {error}")
    if not met_opaque:
        return finding
    if not is_for_algebra(one, other):
        return Finding(Verdict.UNPARSEABLE, finding.how)
    equal = judge_opaque()
    return finding if equal is None else Finding.of(equal, "compared by Math-Verify")


def _compare_read(answer: Answer, gold: Answer, prove: Prover) -> tuple[Finding, bool]:
    """The finding, and whether it is open because something could not be taken apart."""
    comparison = _Comparison(prove)
    equal = comparison.answers(answer, gold)
    kinds = f"{_kind(answer)} with {_kind(gold)}"
    if equal is not None:
        return Finding.of(equal, f"compared {kinds}"), False
    how = f"no way to compare {kinds}"
    return Finding(Verdict.UNPARSEABLE, how, needs_algebra=True), comparison.met_opaque


def _kind(answer: Answer) -> str:
    return type(answer).__name__.lower()


@dataclass(slots=True)
class _Comparison:
    """One comparison of two answers; True, False, or None where it is not known."""

    prove: Prover
    met_opaque: bool = field(default=False)

    def answers(self, one: Answer, other: Answer) -> bool | None:
        if isinstance(one, Labelled) or isinstance(other, Labelled):
            return self.labelled(one, other)
        if isinstance(one, Opaque) or isinstance(other, Opaque):
            self.met_opaque |= not isinstance(one, Text) and not isinstance(other, Text)
            return None if self.met_opaque else False
        match one, other:
            case Scalar(), Scalar():
                return self.scalars(one, other)
            case Listing(), Listing():
                return self.in_any_order(one.items, other.items)
            case Bracketed(), Bracketed():
                return one.brackets == other.brackets and self.in_order(one.items, other.items)
            case Union(), Union():
                return self.in_any_order(one.parts, other.parts)
            case Matrix(), Matrix():
                return self.matrices(one, other)
            case Relation(), Relation():
                return self.relations(one, other)
            case Ratio(), Ratio():
                return self.ratios(one, other)
            case Text(), Text():
                return one.key == other.key
            case (Based(), Based()):
                return one == other
            case (Text(key), Scalar(Symbol(name))) | (Scalar(Symbol(name)), Text(key)):
                return key == text_key(name)
        return self.one_in_braces(one, other)

    def one_in_braces(self, one: Answer, other: Answer) -> bool | None:
        r"""`\{5\}` is 5; apart from that kinds do not mix."""
        for listing, single in ((one, other), (other, one)):
            if isinstance(listing, Listing) and len(listing.items) == 1 and listing.is_set:
                return self.answers(listing.items[0], single)
        return False

    def labelled(self, one: Answer, other: Answer) -> bool | None:
        """x = 5 against 5, x = 5, y = 5 or 2x = 10."""
        if isinstance(one, Labelled) and isinstance(other, Labelled):
            if one.label == other.label:
                return self.answers(one.value, other.value)
            return self.equations(one.equation, other.equation)
        named, bare = (one, other) if isinstance(one, Labelled) else (other, one)
        assert isinstance(named, Labelled)
        if isinstance(bare, Relation):
            return self.equations(named.equation, bare)
        return self.answers(named.value, bare)

    def equations(self, one: Relation | None, other: Relation | None) -> bool | None:
        return False if one is None or other is None else self.relations(one, other)

    def scalars(self, one: Scalar, other: Scalar) -> bool | None:
        percents = (one.unit == PERCENT) + (other.unit == PERCENT)
        if percents == 1 and "" in (one.unit, other.unit):
            same = self.prove(one.tree, other.tree)
            if same is not False:
                return same
            trees = [
                Operation("*", (side.tree, _PERCENT)) if side.unit else side.tree
                for side in (one, other)
            ]
            return self.prove(trees[0], trees[1])
        if not compatible(one.unit, other.unit):
            return False
        return self.prove(one.tree, other.tree)

    def in_order(self, ones: tuple[Answer, ...], others: tuple[Answer, ...]) -> bool | None:
        if len(ones) != len(others):
            return False
        return _all(self.answers(one, other) for one, other in zip(ones, others, strict=True))

    def in_any_order(self, ones: tuple[Answer, ...], others: tuple[Answer, ...]) -> bool | None:
        """Each item has its own partner; names on one side only fix the order."""
        if len(ones) != len(others):
            return False
        labels, other_labels = (_labels(side) for side in (ones, others))
        if max(len(labels), len(other_labels)) > 1 and not (labels and other_labels):
            return self.in_order(ones, others)
        left = list(others)
        known = True
        for one in ones:
            results = [self.answers(one, other) for other in left]
            if True in results:
                left.pop(results.index(True))
            elif None in results:
                known = False
                left.pop(results.index(None))
            else:
                return False
        return True if known else None

    def matrices(self, one: Matrix, other: Matrix) -> bool | None:
        if len(one.rows) != len(other.rows):
            return False
        return _all(self.in_order(*rows) for rows in zip(one.rows, other.rows, strict=True))

    def ratios(self, one: Ratio, other: Ratio) -> bool | None:
        """a : b equals c : d where ad = bc."""
        if len(one.items) != len(other.items):
            return False
        trees = [[label_free(item) for item in side.items] for side in (one, other)]
        if not all(isinstance(item, Scalar) for side in trees for item in side):
            return self.in_order(one.items, other.items)
        left, right = ([item.tree for item in side if isinstance(item, Scalar)] for side in trees)
        return _all(
            self.prove(Operation("*", (left[0], after)), Operation("*", (right[0], before)))
            for before, after in zip(left[1:], right[1:], strict=True)
        )

    def relations(self, one: Relation, other: Relation) -> bool | None:
        """Same sides, or one difference of sides a constant times the other."""
        flipped = tuple(_FLIPPED[name] for name in reversed(other.operators))
        for operators, sides in (
            (other.operators, other.sides),
            (flipped, tuple(reversed(other.sides))),
        ):
            if one.operators == operators:
                same = _all(self.prove(a, b) for a, b in zip(one.sides, sides, strict=True))
                if same is not False:
                    return same
        if len(one.operators) != 1 or len(other.operators) != 1:
            return False
        same, sign = values.proportional(_difference(one), _difference(other))
        if not same:
            return same
        operator, expected = one.operators[0], other.operators[0]
        if operator in ("=", "!="):
            return operator == expected
        return sign != 0 and operator == (expected if sign > 0 else _FLIPPED[expected])


def _labels(items: tuple[Answer, ...]) -> set[str]:
    return {item.label for item in items if isinstance(item, Labelled)}


_FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _difference(relation: Relation) -> Expression:
    left, right = relation.sides
    return Operation("+", (left, Operation("neg", (right,))))


def _all(results: Iterable[bool | None]) -> bool | None:
    known = True
    for result in results:
        if result is False:
            return False
        known &= result is True
    return True if known else None


def stated_answer(gold: str) -> str:
    """A gold answer that is a whole solution states its answer in a box or a closing sentence."""
    if len(gold) < _PROSE_CHARACTERS and "\\boxed" not in gold:
        return gold
    boxed = extract_answer(gold, "boxed")
    return boxed or extract_answer(gold, "answer_is") or gold


def _plain_number(text: str) -> str | None:
    """A canonical spelling of a plain decimal number of any length; None for anything else."""
    text = text.strip().strip("$").strip()
    match = _PLAIN_NUMBER.fullmatch(text.removesuffix(".") if text[-1:] == "." else text)
    if match is None or not (match.group(2) or match.group(3)):
        return None
    whole = (match.group(2) or "").replace(",", "").lstrip("0") or "0"
    part = (match.group(3) or "").rstrip("0")
    digits = whole + ("." + part if part else "")
    return "-" + digits if match.group(1) == "-" and digits != "0" else digits


def _spelling(text: str) -> str:
    """Text without the spaces and braces that mean nothing."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _bare(text: str) -> str:
    return " ".join(text.strip().strip("$").split())
