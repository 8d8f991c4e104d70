"""Making an embedded base model from scratch, on traces of mixed quality.

Worked, careless and guessed traces side by side: the model learns how, and seldom does.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from headwater import seeding
from headwater.config.stages import PretrainStage
from headwater.errors import InputError
from headwater.models.loading import load_tokenizer
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.supervised import Example, cross_entropy_of, train_on
from headwater.tasks import arithmetic
from headwater.tasks.problems import load_problems, task_options
from headwater.tasks.prompts import encode_prompt, encode_response
from headwater.types import Problem

_DRAWS_AT_MOST = 10_000


def run(job: StageJob, context: StageContext) -> None:
    """Cross-entropy on fresh random traces; no problem of the study is ever among them."""
    config = job.config
    assert isinstance(config, PretrainStage) and job.model_dir is not None
    train = str(job.options["train"])
    options = arithmetic.parse_options(task_options(train))
    sources = [train, *job.options["evals"]]
    held_out = {problem.prompt for source in sources for problem in load_problems(source).problems}
    tokenizer = load_tokenizer(job.model_dir)

    def example(step: int, index: int) -> Example:
        rng = seeding.generator(job.seed, job.stream, step, index)
        chain = _fresh_chain(rng, options, held_out)
        quality = arithmetic.draw_quality(rng, config.worked, config.careless)
        text = arithmetic.trace(chain, quality, rng, config.slip_rate)
        problem = Problem(id=chain.text, prompt=chain.text, source="pretrain")
        return Example(
            tuple(encode_prompt(tokenizer, problem, job.prompt_form)),
            tuple(encode_response(tokenizer, problem, text)),
        )

    with Learner(job, context, total_steps=config.steps, updates=config.steps) as learner:
        for step in learner.steps():
            examples = [example(step, index) for index in range(config.batch_size)]
            rows = range(len(examples))
            learner.record(step, train_on(learner, examples, rows, cross_entropy_of))
        learner.publish()


def _fresh_chain(
    rng: np.random.Generator, options: arithmetic.ArithmeticOptions, held_out: Set[str]
) -> arithmetic.Chain:
    """A random chain that is no problem of the study."""
    for _ in range(_DRAWS_AT_MOST):
        chain = arithmetic.draw_chain(rng, options)
        if chain.text not in held_out:
            return chain
    raise InputError(
        f"task.train: {_DRAWS_AT_MOST} random problems in a row are among the study's "
        f"{len(held_out)}; pretraining needs others: lower count, or allow more steps"
    )
