"""Verifiers that ask a function: a user's own, a trainer's reward function, a library's scoring."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from headwater.errors import StageError
from headwater.tasks.procedural import ENTRY
from headwater.types import Completion, Label, Verdict
from headwater.verify.equivalence import Finding
from headwater.verify.extract import ANSWER_FORMS, AnswerForm, extract_first
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

#: What finds a function that a worker imports, and one of the calling process.
_REWARDS = {
    "reward": "headwater.verify.reward_calls:caller",
    "called": "headwater.verify.called_back:caller",
}
_SCORES = "headwater.tasks.procedural:scorer:reasoning_gym"
_ROUNDING = 1e-9
_CHARACTERS = 16 << 20  # of a group's completions, their tokens as numbers, and a row


class _ByFunction(Grading):
    """A verifier whose workers call a user's function, unsealed; it may read any answer form."""

    def __init__(
        self, name: str, target: str, workers: int, timeout_seconds: float, correct_from: float
    ) -> None:
        self.name = name
        self.reads = frozenset(ANSWER_FORMS)
        self._correct_from = correct_from
        limits = WorkerLimits(timeout_seconds, argument_characters=_CHARACTERS, sealed=False)
        self._pool = WorkerPool(target, workers, limits, name)
        self._pool.start()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


class FunctionVerifier(_ByFunction):
    """Grades by a function `f(completion: str, gold: str) -> bool | float`, in workers.

    The number is the reward; from `correct_from` on it counts as correct. A function that raises
    leaves its case UNPARSEABLE, one that runs past its limits TIMEOUT, both without reward. It
    reads whatever it likes, so any answer form goes.
    """

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts with their reasons; raise StageError if the function returns neither
        a bool nor a number."""
        outcomes = self._pool.run([(completion, gold_answer(gold)) for completion, gold in items])
        return [self._grade(outcome) for outcome in outcomes]

    def _grade(self, outcome: CaseOutcome) -> Grade:
        if outcome.ending is not Ending.RETURNED:
            return Grade.of(unfinished(outcome), None, outcome.seconds)
        value = outcome.value
        if not isinstance(value, bool | int | float):
            found = outcome.detail or type(value).__name__
            raise StageError(
                f"verifier {self.name} returned {found} where bool or float is expected; "
                "let the function return True or False, or a reward between 0 and 1"
            )
        return _rewarded(self.name, value, self._correct_from, outcome.seconds)


class RewardVerifier(_ByFunction):
    """Grades by a reward function `f(prompts, completions, **columns) -> list[float]`, in workers.

    It is called once for the completions of a problem that are graded together, and given every
    column of the problem's row. A call that fails or runs past its limits is made again with one
    completion at a time, so that a bad one costs itself alone.
    """

    def __init__(
        self, name: str, target: str, workers: int, timeout_seconds: float, correct_from: float
    ) -> None:
        caller = _REWARDS[name.partition(":")[0]]
        super().__init__(name, f"{caller}:{target}", workers, timeout_seconds, correct_from)

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts, rewards and reasons; raise StageError if the function returns anything
        but a list with a number or None for each completion."""
        groups = [list(group) for _, group in groupby(items, key=_problem)]
        together = self._call(groups)
        alone = [
            [item]
            for group, grades in zip(groups, together, strict=True)
            for item in group
            if grades is None and len(group) > 1
        ]
        again = iter(self._call(alone)) if alone else iter(())
        grades: list[Grade] = []
        for group, found in zip(groups, together, strict=True):
            if found is None:
                found = [one for _ in group for one in next(again) or ()]
            grades += found
        return grades

    def _call(self, groups: Sequence[Sequence[Submission]]) -> list[list[Grade] | None]:
        """Grades of each group; None where a call for several completions failed."""
        calls = [
            (
                json.dumps([text for text, _ in group]),
                json.dumps(_columns(group[0][1]) | _ids(group)),
            )
            for group in groups
        ]
        return [
            self._grades(outcome, len(group))
            for outcome, group in zip(self._pool.run(calls), groups, strict=True)
        ]

    def _grades(self, outcome: CaseOutcome, count: int) -> list[Grade] | None:
        reply: dict[str, Any] = {}
        if outcome.ending is Ending.RETURNED and isinstance(outcome.value, str):
            reply = json.loads(outcome.value)
        if "rewards" not in reply and "found" not in reply:
            if count > 1:
                return None
            raised = f"{self.name} raised {reply.get('raised')}"
            finding = Finding(Verdict.UNPARSEABLE, raised) if reply else unfinished(outcome)
            return [Grade.of(finding, None, outcome.seconds)]
        rewards = reply.get("rewards", [])
        if "found" in reply or len(rewards) != count:
            found = reply.get("found") or f"{len(rewards)} rewards for {count} completions"
            raise StageError(
                f"verifier {self.name} returned {found}; let it return a list with one number (or "
                "None) for each completion"
            )
        seconds = outcome.seconds / count
        return [_rewarded(self.name, value, self._correct_from, seconds) for value in rewards]


class ProceduralVerifier(Grading):
    """Scores answers to reasoning-gym problems by the library; any other problem as mathematics.

    The score, 0 to 1, is the reward; 1 is correct.
    """

    def __init__(
        self,
        name: str,
        forms: tuple[AnswerForm, ...],
        workers: int,
        timeout_seconds: float,
        others: Verifier,
    ) -> None:
        self.name = name
        self.reads = frozenset(forms)
        self._forms = forms
        self._others = others
        self._pool = WorkerPool(_SCORES, workers, WorkerLimits(timeout_seconds=timeout_seconds))

    def examine(self, items: Sequence[Submission]) -> list[Grade]:
        """Return verdicts, rewards and reasons, in order."""
        grades: dict[int, Grade] = {}
        to_score: list[tuple[int, str, str]] = []
        for index, (completion, gold) in enumerate(items):
            if not isinstance(gold, Label) or ENTRY not in (gold.row or {}):
                continue
            since = time.perf_counter()
            extracted = extract_first(completion, self._forms)
            if extracted:
                to_score.append((index, extracted, json.dumps((gold.row or {})[ENTRY])))
            else:
                seconds = time.perf_counter() - since
                grades[index] = Grade.of(no_answer(extracted, self._forms), extracted, seconds)
        outcomes = self._pool.run([call[1:] for call in to_score]) if to_score else []
        for (index, extracted, _), outcome in zip(to_score, outcomes, strict=True):
            grades[index] = _scored(outcome, extracted)
        rest = [index for index in range(len(items)) if index not in grades]
        others = self._others.examine([items[index] for index in rest]) if rest else []
        grades |= dict(zip(rest, others, strict=True))
        return [grades[index] for index in range(len(items))]

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the answers of each pair are the same mathematics."""
        return self._others.same_answers(pairs)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
        self._others.close()


def _problem(item: Submission) -> str:
    gold = item[1]
    return gold.problem_id if isinstance(gold, Label) else gold


def _ids(group: Sequence[Submission]) -> dict[str, Any]:
    """The tokens of each completion, where they are known."""
    found = [list(text.token_ids) for text, _ in group if isinstance(text, Completion)]
    return {"completion_ids": found} if len(found) == len(group) else {}


def _columns(gold: str | Label) -> dict[str, Any]:
    if not isinstance(gold, Label):
        return {"answer": gold}
    if gold.row is not None:
        return dict(gold.row)
    return {"answer": gold.answer, "solution": gold.solution}


def _rewarded(name: str, value: float | None, correct_from: float, seconds: float) -> Grade:
    if value is None or not math.isfinite(value):
        finding = Finding(Verdict.UNPARSEABLE, f"{name} returned {value}, which is no reward")
        return Grade.of(finding, None, seconds)
    finding = Finding.of(value >= correct_from, f"{name} returned {value:g}")
    return Grade.of(finding, None, seconds, float(value))


def _scored(outcome: CaseOutcome, extracted: str) -> Grade:
    if outcome.ending is not Ending.RETURNED or not isinstance(outcome.value, int | float):
        return Grade.of(unfinished(outcome), extracted, outcome.seconds)
    score = outcome.value
    finding = Finding.of(score >= 1 - _ROUNDING, f"scored {score:g} by reasoning-gym")
    return Grade.of(finding, extracted, outcome.seconds, float(score))
