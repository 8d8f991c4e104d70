r"""Is an answer the gold answer? Text and exact arithmetic first; algebra only where they agree.

`compare` runs in the caller's process, does a bounded amount of work and never raises for what a
model wrote. Where it cannot decide it says so (`needs_algebra`), and `algebra.settle` does in a
killable worker. Equality is exact: no tolerance, and a thing is equal only to its own kind (a
set is no tuple, an open interval no closed one, an equation no number).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
_PLAIN_NUMBER = re.compile(r"([+-]?) ?(\d+|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.(\d*))?")


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


OpaqueJudge = Callable[[str, str], bool | None]


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
    judge_opaque: OpaqueJudge = lambda answer, gold: None,
) -> Finding:
    """Compare an extracted answer with a gold answer.

    `prove` decides about two expressions and `judge_opaque` about the whole pair, in common
    notation, where one of the two cannot be read; both return None for not knowing.
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
    return Finding(Verdict.UNPARSEABLE, how, needs_algebra=True), comparison.met_opaque


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


def _spelling(text: str) -> str:
    """Text without the spaces and braces that mean nothing."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _bare(text: str) -> str:
    return " ".join(text.strip().strip("$").split())
