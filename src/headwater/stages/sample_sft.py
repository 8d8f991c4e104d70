"""Teacher-sample SFT: cross-entropy on cached teacher samples, the hard-label baseline."""

from __future__ import annotations

from headwater.config.stages import SampleSFTStage
from headwater.engine.cached_targets import CachedArtifacts
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.supervised import (
    Example,
    batch_rows,
    cross_entropy_of,
    planned_steps,
    train_on,
)


def run(job: StageJob, context: StageContext) -> None:
    """Train `job.model_dir` on the responses in rollouts' folders; no teacher, no vault."""
    config = job.config
    assert isinstance(config, SampleSFTStage) and job.rollouts_dir is not None
    cached = CachedArtifacts((job.rollouts_dir, *job.teachers.values()))
    examples = [Example(prompt, response) for prompt, response, _ in cached.examples]
    total = planned_steps(len(examples), config.batch_size, config.epochs, config.steps)
    with Learner(job, context, total_steps=total, updates=total) as learner:
        for step in learner.steps():
            rows = batch_rows(len(examples), config.batch_size, step, (job.seed, job.stream))
            learner.record(step, train_on(learner, examples, rows, cross_entropy_of))
        learner.publish()
