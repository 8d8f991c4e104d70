"""Verifiers: from completions and gold answers to verdicts, each with its reason.

A gold answer passes through as an argument only: no record, message or repr here holds one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from headwater.errors import InputError, StageError
from headwater.tasks.prompts import prompt_form, render_solution
from headwater.types import Label, Verdict
from headwater.verify.equivalence import Finding, compare, same_text
from headwater.verify.extract import ANSWER_FORMS, AnswerForm, extract_first
from headwater.verify.pool import CaseOutcome, Ending, WorkerLimits, WorkerPool

_ALGEBRA = "headwater.verify.algebra:settle"
_CHEAP_CHARACTERS = 1_000
_EXAMPLES_TRIED = 3
_CHOICES = 'choose "math", "exact" or "python:module:function"'


@dataclass(frozen=True, slots=True)
class Explanation:
    """A verdict and why: what was read from the completion and how it was compared.

    `seconds` is the case's own time, without waiting for a free worker.
    """

    verdict: Verdict
    extracted: str | None
    how: str
    seconds: float


class Verifier(Protocol):
    """Grades completions against gold answers; `reads` are the answer forms it looks for."""

    name: str
    reads: frozenset[str]

    def grade(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return a verdict for each (completion, gold answer), in order."""
        ...

    def examine(self, items: Sequence[tuple[str, str]]) -> list[Explanation]:
        """Return verdicts with their reasons, in order."""
        ...

    def explain(self, completion: str, gold: str) -> Explanation:
        """Return one verdict with its reason."""
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


def make_verifier(spec: str, *, workers: int = 1, timeout_seconds: float = 5.0) -> Verifier:
    """Return the verifier a recipe names.

    `spec`: "math", "exact" (either may add the answer forms it reads, in order, as in
    "math:boxed,hash"; "boxed" by default) or "python:module:function". `workers`: processes that
    grade at once; `timeout_seconds`: wall time of one case. Raises InputError for an unknown
    spec, for limits that are not positive, and for a function that cannot be loaded.
    """
    if timeout_seconds <= 0:
        raise InputError(f"timeout_seconds={timeout_seconds} leaves no time; set it above 0")
    kind, _, rest = spec.partition(":")
    if kind == "math":
        return MathVerifier(spec, _forms(spec, rest), workers, timeout_seconds)
    if kind == "exact":
        return ExactVerifier(spec, _forms(spec, rest))
    if kind == "python" and all(rest.partition(":")):
        return FunctionVerifier(spec, rest, workers, timeout_seconds)
    raise InputError(f"verifier {spec!r} is not known; {_CHOICES}")


def accepts_examples(verifier: Verifier, form: str, labels: Sequence[Label]) -> bool | None:
    """Whether `verifier` accepts what it should: responses that end in the gold as `form` asks.

    One of the first few is enough. None where there is nothing to try: in the bare form only a
    worked solution shows how an answer looks.
    """
    if prompt_form(form).instruction is None:
        labels = [label for label in labels if label.solution is not None]
    tried = [
        (render_solution(form, label.solution, label.answer), label.answer)
        for label in labels[:_EXAMPLES_TRIED]
    ]
    return Verdict.CORRECT in verifier.grade(tried) if tried else None


def _forms(spec: str, listed: str) -> tuple[AnswerForm, ...]:
    if not listed:
        if spec.endswith(":"):
            raise InputError(f"verifier {spec!r} names no answer form; drop the colon")
        return ("boxed",)
    wanted = listed.split(",")
    forms = tuple(form for name in wanted for form in ANSWER_FORMS if form == name)
    if len(forms) != len(wanted):
        raise InputError(
            f"verifier {spec!r} asks for an unknown answer form; use {', '.join(ANSWER_FORMS)}"
        )
    return forms


class _Grading:
    """What all verifiers share: everything follows from `examine`."""

    name: str
    reads: frozenset[str]

    def examine(self, items: Sequence[tuple[str, str]]) -> list[Explanation]:
        raise NotImplementedError

    def grade(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return a verdict for each (completion, gold answer), in order."""
        return [explanation.verdict for explanation in self.examine(items)]

    def explain(self, completion: str, gold: str) -> Explanation:
        """Return one verdict with its reason."""
        return self.examine([(completion, gold)])[0]

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


class ExactVerifier(_Grading):
    """The answer must be the gold answer, letter for letter after spacing and `$` are dropped."""

    def __init__(self, name: str, forms: tuple[AnswerForm, ...]) -> None:
        self.name = name
        self.reads = frozenset(forms)
        self._forms = forms

    def examine(self, items: Sequence[tuple[str, str]]) -> list[Explanation]:
        """Return verdicts with their reasons, in order."""
        explanations = []
        for completion, gold in items:
            since = time.perf_counter()
            extracted = extract_first(completion, self._forms)
            if not extracted:
                finding = _no_answer(extracted, self._forms)
            else:
                finding = Finding.of(same_text(extracted, gold), "compared letter for letter")
            seconds = time.perf_counter() - since
            explanations.append(Explanation(finding.verdict, extracted, finding.how, seconds))
        return explanations


class MathVerifier(_Grading):
    """Mathematical equality of the extracted answer and the gold answer.

    Short text and rational numbers are compared here; what is long or needs algebra goes to
    killable workers, which start when the first such case comes.
    """

    def __init__(
        self, name: str, forms: tuple[AnswerForm, ...], workers: int, timeout_seconds: float
    ) -> None:
        self.name = name
        self.reads = frozenset(forms)
        self._forms = forms
        self._pool = WorkerPool(_ALGEBRA, workers, WorkerLimits(timeout_seconds=timeout_seconds))

    def examine(self, items: Sequence[tuple[str, str]]) -> list[Explanation]:
        """Return verdicts with their reasons, in order."""
        explanations: list[Explanation] = []
        open_cases: list[tuple[int, str, str]] = []
        for index, (completion, gold) in enumerate(items):
            since = time.perf_counter()
            extracted = extract_first(completion, self._forms)
            if not extracted:
                finding = _no_answer(extracted, self._forms)
            elif len(extracted) + len(gold) > _CHEAP_CHARACTERS:
                finding = _TOO_LONG_FOR_HERE
                open_cases.append((index, extracted, gold))
            else:
                finding = compare(extracted, gold)
                if finding.needs_algebra:
                    open_cases.append((index, extracted, gold))
            seconds = time.perf_counter() - since
            explanations.append(Explanation(finding.verdict, extracted, finding.how, seconds))
        outcomes = self._pool.run([case[1:] for case in open_cases]) if open_cases else []
        for (index, extracted, _), outcome in zip(open_cases, outcomes, strict=True):
            finding = _settled(outcome)
            seconds = explanations[index].seconds + outcome.seconds
            explanations[index] = Explanation(finding.verdict, extracted, finding.how, seconds)
        return explanations

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


class FunctionVerifier(_Grading):
    """Grades by a function `f(completion: str, gold: str) -> bool | float`, in workers.

    A number counts as correct from 1.0 on. A function that raises leaves its case UNPARSEABLE,
    one that runs past its limits TIMEOUT. It reads whatever it likes, so any answer form goes.
    """

    def __init__(self, name: str, target: str, workers: int, timeout_seconds: float) -> None:
        self.name = name
        self.reads = frozenset(ANSWER_FORMS)
        limits = WorkerLimits(timeout_seconds=timeout_seconds, sealed=False)
        self._pool = WorkerPool(target, workers, limits)
        self._pool.start()

    def examine(self, items: Sequence[tuple[str, str]]) -> list[Explanation]:
        """Return verdicts with their reasons; raise StageError if the function returns neither
        a bool nor a number."""
        explanations = []
        for outcome in self._pool.run([tuple(item) for item in items]):
            finding = self._finding(outcome)
            explanations.append(Explanation(finding.verdict, None, finding.how, outcome.seconds))
        return explanations

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _finding(self, outcome: CaseOutcome) -> Finding:
        if outcome.ending is not Ending.RETURNED:
            return _unfinished(outcome)
        value = outcome.value
        if not isinstance(value, bool | int | float):
            found = outcome.detail or type(value).__name__
            raise StageError(
                f"verifier {self.name} returned {found} where bool or float is expected; "
                "let the function return True or False, or a reward between 0 and 1"
            )
        return Finding.of(value >= 1, f"{self.name} returned {value}")


_TOO_LONG_FOR_HERE = Finding(Verdict.UNPARSEABLE, "too long to compare outside a worker")


def _no_answer(extracted: str | None, forms: Sequence[AnswerForm]) -> Finding:
    if extracted is None:
        how = f"no answer after any thinking (looked for {', '.join(forms)})"
        return Finding(Verdict.UNPARSEABLE, how)
    return Finding(Verdict.UNPARSEABLE, "the answer is empty")


def _settled(outcome: CaseOutcome) -> Finding:
    if outcome.ending is Ending.RETURNED and isinstance(outcome.value, str):
        verdict, _, how = outcome.value.partition(":")
        return Finding(Verdict(verdict), how)
    return _unfinished(outcome)


def _unfinished(outcome: CaseOutcome) -> Finding:
    if outcome.ending in (Ending.OUT_OF_TIME, Ending.OUT_OF_MEMORY, Ending.CRASHED):
        return Finding(Verdict.TIMEOUT, f"the comparison {_RAN[outcome.ending]}")
    detail = f" ({outcome.detail})" if outcome.detail else ""
    return Finding(Verdict.UNPARSEABLE, f"the comparison stopped: {outcome.ending}{detail}")


_RAN = {
    Ending.OUT_OF_TIME: "ran out of time",
    Ending.OUT_OF_MEMORY: "ran out of memory",
    Ending.CRASHED: "ended its worker each time it was tried",
}
