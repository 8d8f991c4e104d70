"""Supervised fine-tuning on worked solutions, read through the vault and charged as labels."""

from __future__ import annotations

from headwater.config.stages import SFTStage
from headwater.models.loading import load_tokenizer
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


def run(job: StageJob, context: StageContext) -> None:
    """Cross-entropy on the worked solution of every problem of the pool."""
    config = job.config
    assert isinstance(config, SFTStage) and job.model_dir is not None and context.vault is not None
    total = planned_steps(len(job.problems), config.batch_size, config.epochs, config.steps)
    with Learner(job, context, total_steps=total, updates=total) as learner:
        ids = [problem.id for problem in job.problems]
        solutions = context.vault.worked_responses(context.account, ids, job.prompt_form)
        tokenizer = load_tokenizer(job.model_dir)
        examples = [
            Example(
                tuple(encode_prompt(tokenizer, problem, job.prompt_form)),
                tuple(encode_response(tokenizer, problem, solution)),
            )
            for problem, solution in zip(job.problems, solutions, strict=True)
        ]
        for step in learner.steps():
            rows = batch_rows(len(examples), config.batch_size, step, (job.seed, job.stream))
            learner.record(step, train_on(learner, examples, rows, cross_entropy_of))
        learner.publish()
