"""Making an embedded base model from scratch, on traces of mixed quality.

Worked, careless and guessed traces side by side: the model learns how, and seldom does.
"""

from __future__ import annotations

from headwater import seeding
from headwater.config.stages import PretrainStage
from headwater.models.loading import load_tokenizer
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.supervised import Example, cross_entropy_of, train_on
from headwater.tasks import arithmetic
from headwater.tasks.problems import load_problems, task_options
from headwater.tasks.prompts import encode_prompt, encode_response
from headwater.types import Problem


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
        chain = arithmetic.draw_chain(rng, options)
        while chain.text in held_out:
            chain = arithmetic.draw_chain(rng, options)
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
