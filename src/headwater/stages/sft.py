"""Supervised fine-tuning on worked solutions, read through the vault and charged as labels."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.config.stages import SFTStage
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.supervised import (
    Example,
    batch_rows,
    cross_entropy_of,
    planned_steps,
    train_on,
)
from headwater.tasks.prompts import encode_prompt, encode_response
from headwater.types import Problem


def run(job: StageJob, context: StageContext) -> None:
    """Cross-entropy on the worked solutions of the pool.

    A solution is read, and charged, when a step first needs it.
    """
    config = job.config
    assert isinstance(config, SFTStage)
    count = len(job.problems)
    total = planned_steps(count, config.batch_size, config.epochs, config.steps)
    with Learner(job, context, total_steps=total, updates=total) as learner:
        solutions = _Solutions(learner)
        for step in learner.steps():
            rows = batch_rows(count, config.batch_size, step, (job.seed, job.stream))
            examples = solutions.examples(rows)
            places = range(len(rows))
            learner.record(step, train_on(learner, examples, places, cross_entropy_of))
        learner.publish()


class _Solutions:
    """The pool's worked solutions, encoded; each is read through the vault once a process."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._read: dict[int, Example] = {}

    def examples(self, rows: Sequence[int]) -> list[Example]:
        """Examples of the problems at `rows`. Raises BudgetExhausted when labels run out."""
        job, context = self._learner.job, self._learner.context
        assert context.vault is not None
        missing = [row for row in rows if row not in self._read]
        if missing:
            self._learner.will_charge_at_once()
            ids = [job.problems[row].id for row in missing]
            solutions = context.vault.worked_responses(context.account, ids, job.prompt_form)
            for row, solution in zip(missing, solutions, strict=True):
                self._read[row] = self._encoded(job.problems[row], solution)
        return [self._read[row] for row in rows]

    def _encoded(self, problem: Problem, solution: str) -> Example:
        tokenizer = self._learner.tokenizer
        return Example(
            tuple(encode_prompt(tokenizer, problem, self._learner.job.prompt_form)),
            tuple(encode_response(tokenizer, problem, solution)),
        )
