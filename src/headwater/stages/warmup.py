"""Forward-KL warmup on cached teacher rollouts with the teacher's distributions.

Soft targets on teacher occupancy (arXiv:2605.12483, Eq. 5); no vault.
"""

from __future__ import annotations

import torch

from headwater.config.stages import WarmupStage
from headwater.engine.cached_targets import CachedArtifacts
from headwater.engine.packing import TokenBatch
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.token_losses import distillation_loss
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.supervised import Example, batch_rows, planned_steps, train_on


def run(job: StageJob, context: StageContext) -> None:
    """Train `job.model_dir` on the distributions cached in rollouts' folders."""
    config = job.config
    assert isinstance(config, WarmupStage) and job.rollouts_dir is not None
    cached = CachedArtifacts((job.rollouts_dir, *job.teachers.values()))
    examples = [Example(*one) for one in cached.examples]
    total = planned_steps(len(examples), config.batch_size, config.epochs, config.steps)
    with Learner(job, context, total_steps=total, updates=total) as learner:

        def forward_kl_of(tokens: TokenBatch) -> ChunkLoss:
            targets = cached.targets(tokens.rows, learner.device, learner.dtype)
            ones = torch.ones(tokens.target_ids_T.shape[0], device=learner.device)
            return distillation_loss(
                tokens.target_ids_T,
                ones,
                targets,
                forward_weight=1.0,
                teacher_temperature=config.teacher_temperature,
            )

        for step in learner.steps():
            rows = batch_rows(len(examples), config.batch_size, step, (job.seed, job.stream))
            learner.record(step, train_on(learner, examples, rows, forward_kl_of))
        learner.publish()
