r"""Is an answer the gold answer? Text and exact arithmetic first; algebra only where they agree.

`compare_at_sight` decides by spelling alone; it is safe in any process. `compare` reads and
computes, which a crafted answer can make last: what models wrote is given to it in killable
workers only (`algebra.settle`). Equality is exact: no tolerance, and a thing is equal only to its
own kind (a set is no tuple, an open interval no closed one, an equation no number).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from headwater.types import Verdict
from headwater.verify import values
from headwater.verify.answers import read_answer
from headwater.verify.extract import extract_answer
from headwater.verify.kinds import Answer
from headwater.verify.matching import Matching, Prover
from headwater.verify.notation import normalise
from headwater.verify.opaque import is_for_algebra, without_common_label
from headwater.verify.tokens import PastLimits, TooLarge

MAX_ANSWER_CHARACTERS = 50_000
_PROSE_CHARACTERS = 200
_SIGHT_CHARACTERS = 1_000
_LONGEST_DECIMAL = 30
_PLAIN_NUMBER = re.compile(r"([+-]?) ?(\d+|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.(\d*))?", re.ASCII)
_SIMPLE_FRACTION = re.compile(
    r"(-?)(?:\\[dt]?frac ?\{(-?\d{1,18})\} ?\{(\d{1,18})\}|(\d{1,18}) ?/ ?(\d{1,18}))", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict and how it was reached."""

    verdict: Verdict
    how: str

    @staticmethod
    def of(equal: bool, how: str) -> Finding:
        """CORRECT or INCORRECT."""
        return Finding(Verdict.CORRECT if equal else Verdict.INCORRECT, how)


OpaqueJudge = Callable[[str, str], bool | None]


def same_text(answer: str, gold: str) -> bool:
    r"""Whether two answers are the same letters once `$` and spacing around them are dropped.

    >>> same_text(" $7$ ", "7"), same_text("7.0", "7")
    (True, False)
    """
    return _bare(answer) == _bare(gold)


def compare_at_sight(answer: str, gold: str) -> Finding | None:
    r"""What spelling alone decides, in time linear in short texts; None for everything else.

    Plain numbers (of any length) and simple fractions are compared by value, other short texts
    are equal where they are written the same.

    >>> compare_at_sight("1,000.0", "1000").verdict, compare_at_sight(r"\frac{1}{2}", "3/6").verdict
    (<Verdict.CORRECT: 'correct'>, <Verdict.CORRECT: 'correct'>)
    >>> compare_at_sight(r"\sqrt{8}", r"2\sqrt{2}") is None
    True
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Finding(Verdict.UNPARSEABLE, f"longer than {MAX_ANSWER_CHARACTERS} characters")
    stated = stated_answer(gold)
    numbers = _plain_number(answer), _plain_number(stated)
    if numbers[0] and numbers[1]:
        return Finding.of(numbers[0] == numbers[1], "compared as plain numbers, digit by digit")
    if len(answer) + len(stated) > _SIGHT_CHARACTERS:
        return None
    fractions = _simple_fraction(answer), _simple_fraction(stated)
    if None not in fractions:
        return Finding.of(fractions[0] == fractions[1], "compared as fractions")
    one, other = normalise(answer), normalise(stated)
    if not one:
        return Finding(Verdict.UNPARSEABLE, "nothing is left once spacing is dropped")
    if _spelling(one) == _spelling(other):
        return Finding.of(True, "written the same")
    return None


def compare(
    answer: str,
    gold: str,
    prove: Prover = values.equal,
    judge_opaque: OpaqueJudge = lambda answer, gold: None,
) -> Finding:
    """Compare an extracted answer with a gold answer.

    `prove` decides about two expressions and `judge_opaque` about the whole pair, in common
    notation, where one of the two cannot be read; both return None for not knowing.
    """
    seen = compare_at_sight(answer, gold)
    if seen is not None:
        return seen
    one, other = normalise(answer), normalise(stated_answer(gold))
    if not one:
        return Finding(Verdict.UNPARSEABLE, "nothing is left once spacing is dropped")
    if _spelling(one) == _spelling(other):  # of longer texts
        return Finding.of(True, "written the same")
    try:
        finding, met_opaque = _compare_read(read_answer(one), read_answer(other), prove)
    except TooLarge as error:
        return Finding(Verdict.TIMEOUT, f"would run past its limits: {error}")
    except PastLimits as error:
        return Finding(Verdict.UNPARSEABLE, f"cannot be read: {error}")
    if not met_opaque:
        return finding
    one, other = without_common_label(one, other)
    if not is_for_algebra(one, other):
        return Finding(Verdict.UNPARSEABLE, finding.how)
    equal = judge_opaque(one, other)
    return finding if equal is None else Finding.of(equal, "compared by Math-Verify")


def _compare_read(answer: Answer, gold: Answer, prove: Prover) -> tuple[Finding, bool]:
    """The finding, and whether it is open because something could not be taken apart."""
    comparison = Matching(prove)
    equal = comparison.answers(answer, gold)
    kinds = f"{_kind(answer)} with {_kind(gold)}"
    if equal is not None:
        return Finding.of(equal, f"compared {kinds}"), False
    how = f"no way to compare {kinds}"
    return Finding(Verdict.UNPARSEABLE, how), comparison.met_opaque


def _kind(answer: Answer) -> str:
    return type(answer).__name__.lower()


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


def _simple_fraction(text: str) -> Fraction | None:
    r"""The value of a short plain number, `a/b` or `\frac{a}{b}`; None for anything else."""
    text = text.strip().strip("$").strip()
    number = _plain_number(text) if len(text) <= _LONGEST_DECIMAL else None
    if number is not None:
        return Fraction(number)
    match = _SIMPLE_FRACTION.fullmatch(text)
    if match is None:
        return None
    over, under = (int(match[2] or match[4]), int(match[3] or match[5]))
    if under == 0:
        return None
    return Fraction(-over if match[1] else over, under)


def _spelling(text: str) -> str:
    """Text without the spaces and braces that mean nothing."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _bare(text: str) -> str:
    return " ".join(text.strip().strip("$").split())
