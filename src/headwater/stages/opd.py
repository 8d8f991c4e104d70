"""On-policy distillation: a KL to a frozen teacher on the student's own rollouts.

No vault and no verifier: prompts only (arXiv:2605.12483, Eq. 2 and 4).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from headwater.config.stages import OPDStage
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, pack
from headwater.losses.chunked_head import chunked_head_loss
from headwater.models.compatibility import check_same_tokenizer
from headwater.stages.ahead import StepRollouts, source_of
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.rollouts import RolloutBatch, readable_rows
from headwater.stages.teacher_term import TeacherTerm
from headwater.types import LossSums


def run(job: StageJob, context: StageContext) -> None:
    """Train `job.model_dir` towards its problems' teachers for `config.steps` steps."""
    config = job.config
    assert isinstance(config, OPDStage)
    assert job.model_dir is not None and job.teacher_dir is not None
    for teacher_dir in (job.teacher_dir, *job.teachers.values()):
        check_same_tokenizer(job.model_dir, teacher_dir)
    with Learner(job, context, total_steps=config.steps, updates=config.steps) as learner:
        trainer = _OPD(learner, config)
        for step in learner.steps():
            trainer.step(step)
        learner.publish()


class _OPD:
    def __init__(self, learner: Learner, config: OPDStage) -> None:
        self.learner, self.config = learner, config
        self.source = source_of(learner, config.sampling)
        self.teacher = TeacherTerm(learner, config, config.kl, self.source.sampling.temperature)
        self.rollouts = StepRollouts(learner, config, self.source, self.teacher.score)

    def step(self, step: int) -> None:
        """One batch of student rollouts and one update on the teacher's opinion of it."""
        config, learner = self.config, self.learner
        started = time.perf_counter()
        drawn = self.rollouts.take(step)
        problems, batch = drawn.problems, drawn.batch
        tokens = int(batch.lengths_N.sum())
        learner.charge_sampling(len(problems), tokens)
        sampled = time.perf_counter()
        weights_N, denominator = batch.token_weights(
            config.normalization, self.source.sampling.max_new_tokens
        )
        self.teacher.prepare(drawn.scores)
        lag = self.rollouts.lag(drawn)
        packed = batch.packed(teachers=self.teacher.numbers(problems))
        result = learner.update(packed, denominator, partial(self._loss, batch, weights_N))
        trained = sum(group.tokens for group in packed)
        learner.charge_training(trained)
        self.teacher.charge(packed)
        now = time.perf_counter()
        metrics = (
            dict(result.metrics)
            | batch.shape_metrics()
            | lag
            | {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "trained_tokens": trained,
                "sampling_seconds": sampled - started,
                "training_seconds": now - sampled,
                "tokens_per_second": tokens / (now - started),
            }
        )
        texts = [self.source.text(r) for r in batch.rollouts]
        learner.record(step, metrics, readable_rows(learner.job, step, batch, texts, problems))

    def _loss(
        self, batch: RolloutBatch, weights_N: torch.Tensor, micro: Sequence[PackedGroup]
    ) -> LossSums:
        learner = self.learner
        tokens = pack(micro, dtype=learner.dtype, device=learner.device)
        loss = self.teacher.chunk_loss(batch, weights_N, micro, tokens)
        hidden = hidden_at_targets(learner.model, tokens, batch.known(micro, tokens))
        head = head_weight(learner.model, learner.vocab_size)
        return chunked_head_loss(hidden, head, loss)
