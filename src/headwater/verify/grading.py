"""What all verifiers share: the grade of a completion, and the protocol of those who give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from headwater.types import Label, Verdict
from headwater.verify.equivalence import Finding, compare_at_sight
from headwater.verify.pool import CaseOutcome, Ending

#: A completion and its gold answer; the whole label where more than the answer is read.
Submission = tuple[str, str | Label]


@dataclass(frozen=True, slots=True)
class Grade:
    """A completion's verdict and why: what was read from it and how that was compared.

    `reward` is what GRPO is trained on: 1 or 0 by the verdict, unless a function says otherwise.
    `seconds` is the case's own time, without waiting for a free worker.
    """

    verdict: Verdict
    extracted: str | None
    how: str
    seconds: float
    reward: float

    @classmethod
    def of(
        cls, finding: Finding, extracted: str | None, seconds: float, reward: float | None = None
    ) -> Self:
        """The grade that a finding comes to."""
        if reward is None:
            reward = float(finding.verdict is Verdict.CORRECT)
        return cls(finding.verdict, extracted, finding.how, seconds, reward)


class Verifier(Protocol):
    """Grades completions against gold answers; `reads` are the answer forms it looks for."""

    name: str
    reads: frozenset[str]

    def grade(self, items: Sequence[Submission]) -> list[Verdict]:
        """Return a verdict for each (completion, gold answer or label), in order."""
        ...

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts with their rewards and reasons, in order."""
        ...

    def explain(self, completion: str, gold: str | Label) -> Grade:
        """Return one verdict with its reason."""
        ...

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the two (extracted) answers of each pair are the same."""
        ...

    def close(self) -> None:
        """End the verifier's processes."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Grading:
    """The part of a verifier that follows from `examine`."""

    name: str
    reads: frozenset[str]

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        raise NotImplementedError

    def grade(self, items: Sequence[Submission]) -> list[Verdict]:
        """Return a verdict for each (completion, gold answer or label), in order."""
        return [grade.verdict for grade in self.examine(items)]

    def explain(self, completion: str, gold: str | Label) -> Grade:
        """Return one verdict with its reason."""
        return self.examine([(completion, gold)])[0]

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the answers of each pair are the same, as far as sight goes."""
        found = (compare_at_sight(one, other) for one, other in pairs)
        return [seen is not None and seen.verdict is Verdict.CORRECT for seen in found]

    def close(self) -> None:
        """End the verifier's processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def gold_answer(gold: str | Label) -> str:
    """The answer itself."""
    return gold.answer if isinstance(gold, Label) else gold


def no_answer(extracted: str | None, forms: Sequence[str]) -> Finding:
    """The finding where a completion gives no answer in any of the forms."""
    if extracted is None:
        how = f"no answer after any thinking (looked for {', '.join(forms)})"
        return Finding(Verdict.UNPARSEABLE, how)
    return Finding(Verdict.UNPARSEABLE, "the answer is empty")


def unfinished(outcome: CaseOutcome) -> Finding:
    """The finding where a worker did not return."""
    if outcome.ending in _RAN:
        return Finding(Verdict.TIMEOUT, f"the comparison {_RAN[outcome.ending]}")
    detail = f" ({outcome.detail})" if outcome.detail else ""
    return Finding(Verdict.UNPARSEABLE, f"the comparison stopped: {outcome.ending}{detail}")


_RAN = {
    Ending.OUT_OF_TIME: "ran out of time",
    Ending.OUT_OF_MEMORY: "ran out of memory",
    Ending.CRASHED: "ended its worker each time it was tried",
}
