"""Verifiers: from completions and gold answers to verdicts, each with its reason.

A gold answer passes through as an argument only: no record, message or repr here holds one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from headwater.errors import InputError
from headwater.near_names import near
from headwater.tasks.prompts import prompt_form, render_solution
from headwater.types import Label, Verdict
from headwater.verify.equivalence import Finding, compare_at_sight, same_text
from headwater.verify.extract import ANSWER_FORMS, AnswerForm, extract_first
from headwater.verify.functions import FunctionVerifier, ProceduralVerifier, RewardVerifier
from headwater.verify.grading import (
    Grade,
    Grading,
    Submission,
    Verifier,
    gold_answer,
    no_answer,
    unfinished,
)
from headwater.verify.pool import CaseOutcome, Ending, WorkerLimits, WorkerPool

_ALGEBRA = "headwater.verify.algebra:settle"
_EXAMPLES_TRIED = 3
_KINDS = ("math", "exact", "reasoning_gym", "python", "reward")
_CHOICES = (
    'choose "math", "exact", "reasoning_gym", "python:module:function" or "reward:module:function"'
)


def make_verifier(
    spec: str, *, workers: int = 1, timeout_seconds: float = 5.0, correct_from: float = 1.0
) -> Verifier:
    """Return the verifier a recipe names.

    `spec`: "math", "exact" or "reasoning_gym" (each may add the answer forms it reads, in order,
    as in "math:boxed,hash"; "boxed" by default), "python:module:function" (completion, gold ->
    bool or number) or "reward:module:function" (prompts, completions, **columns -> numbers); a
    path ending in .py may stand for the module; "called:..." is a function that this process
    offers (`headwater.verify.called_back`). `workers`: processes that grade at once;
    `timeout_seconds`: wall time of one case (one call of a function); `correct_from`: the number
    of a function from which on a completion counts as correct. Raises InputError for an unknown
    spec, for limits that are not positive, and for a function that cannot be loaded.
    """
    if timeout_seconds <= 0:
        raise InputError(f"timeout_seconds={timeout_seconds} leaves no time; set it above 0")
    kind, _, rest = spec.partition(":")
    if kind == "math":
        return MathVerifier(spec, _forms(spec, rest), workers, timeout_seconds)
    if kind == "exact":
        return ExactVerifier(spec, _forms(spec, rest))
    if kind == "reasoning_gym":
        forms = _forms(spec, rest)
        others = MathVerifier(spec, forms, workers, timeout_seconds)
        return ProceduralVerifier(spec, forms, workers, timeout_seconds, others)
    if all(rest.rpartition(":")):
        if kind == "python":
            return FunctionVerifier(spec, rest, workers, timeout_seconds, correct_from)
        if kind == "reward":
            return RewardVerifier(spec, rest, workers, timeout_seconds, correct_from)
    if kind == "called" and rest:
        return RewardVerifier(spec, rest, workers, timeout_seconds, correct_from)
    raise InputError(f"verifier {spec!r} is not known; {_CHOICES}{near(kind, _KINDS)}")


def reads_rows(spec: str) -> bool:
    """Whether the verifier of this name reads more of a problem's row than its answer."""
    return spec.startswith(("reward:", "called:"))


def check_answers(spec: str, source: str, labels: Sequence[Label]) -> None:
    """Refuse problems without an answer where the verifier of this name compares with one.

    Raises InputError naming the source.
    """
    if spec.partition(":")[0] in ("reward", "called", "reasoning_gym"):
        return
    if any(not label.answer for label in labels):
        raise InputError(
            f"{source}: some problems have many right answers and name none, but verifier {spec} "
            "compares with one; use verifier: reasoning_gym"
        )


def accepts_examples(verifier: Verifier, form: str, labels: Sequence[Label]) -> bool | None:
    """Whether `verifier` accepts what it should: responses that end in the gold as `form` asks.

    One of the first few is enough. None where there is nothing to try: in the bare form only a
    worked solution shows how an answer looks, and some problems have many right answers and name
    none.
    """
    if prompt_form(form).instruction is None:
        labels = [label for label in labels if label.solution is not None]
    tried = [
        (render_solution(form, label.solution, label.answer), label)
        for label in labels[:_EXAMPLES_TRIED]
        if label.answer or label.solution
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


class ExactVerifier(Grading):
    """The answer must be the gold answer, letter for letter after spacing and `$` are dropped."""

    def __init__(self, name: str, forms: tuple[AnswerForm, ...]) -> None:
        self.name = name
        self.reads = frozenset(forms)
        self._forms = forms

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts with their reasons, in order."""
        grades = []
        for completion, gold in items:
            since = time.perf_counter()
            extracted = extract_first(completion, self._forms)
            if not extracted:
                finding = no_answer(extracted, self._forms)
            else:
                same = same_text(extracted, gold_answer(gold))
                finding = Finding.of(same, "compared letter for letter")
            grades.append(Grade.of(finding, extracted, time.perf_counter() - since))
        return grades

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the answers of each pair are the same letters."""
        return [same_text(one, other) for one, other in pairs]


class MathVerifier(Grading):
    """Mathematical equality of the extracted answer and the gold answer.

    Plain numbers, simple fractions and equal spellings are decided here; everything else goes to
    killable workers, which start when the first such case comes.
    """

    def __init__(
        self, name: str, forms: tuple[AnswerForm, ...], workers: int, timeout_seconds: float
    ) -> None:
        self.name = name
        self.reads = frozenset(forms)
        self._forms = forms
        self._pool = WorkerPool(_ALGEBRA, workers, WorkerLimits(timeout_seconds=timeout_seconds))

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts with their reasons, in order."""
        read: list[tuple[str | None, float]] = []
        for completion, _ in items:
            since = time.perf_counter()
            extracted = extract_first(completion, self._forms)
            read.append((extracted, time.perf_counter() - since))
        pairs = [
            (extracted, gold_answer(gold))
            for (extracted, _), (_, gold) in zip(read, items, strict=True)
            if extracted
        ]
        compared = iter(self._compare(pairs))
        grades = []
        for extracted, seconds in read:
            if extracted:
                finding, more = next(compared)
                grades.append(Grade.of(finding, extracted, seconds + more))
            else:
                grades.append(Grade.of(no_answer(extracted, self._forms), extracted, seconds))
        return grades

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the answers of each pair are equal."""
        return [finding.verdict is Verdict.CORRECT for finding, _ in self._compare(pairs)]

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Finding, float]]:
        """Findings about (answer, gold) pairs, and the seconds each took."""
        found: list[tuple[Finding, float]] = []
        open_places: list[int] = []
        for place, (answer, gold) in enumerate(pairs):
            since = time.perf_counter()
            finding = compare_at_sight(answer, gold)
            if finding is None:
                open_places.append(place)
            found.append((finding or _OPEN, time.perf_counter() - since))
        outcomes = self._pool.run([pairs[place] for place in open_places]) if open_places else []
        for place, outcome in zip(open_places, outcomes, strict=True):
            found[place] = (_settled(outcome), found[place][1] + outcome.seconds)
        return found

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


_OPEN = Finding(Verdict.UNPARSEABLE, "not compared yet")


def _settled(outcome: CaseOutcome) -> Finding:
    if outcome.ending is Ending.RETURNED and isinstance(outcome.value, str):
        verdict, _, how = outcome.value.partition(":")
        return Finding(Verdict(verdict), how)
    return unfinished(outcome)
