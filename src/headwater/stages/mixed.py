"""A verifier's reward and a teacher's, mixed at any lambda, on the student's own rollouts.

arXiv:2605.12483, Eq. 3: (1 - lambda) of the dense term, whose reverse KL holds the entropy, and
lambda of the group-relative advantage. A step with lambda 0 reads no label.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from headwater.config.stages import MixedStage
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, pack
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.grpo import group_advantages, zero_variance
from headwater.losses.mixed import mixed_loss
from headwater.models.compatibility import check_same_tokenizer
from headwater.rollout.scoring import FrozenModel
from headwater.stages.ahead import Drawn, StepRollouts, source_of
from headwater.stages.grading import apart, grade_groups, grade_metrics, rewards_of
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.policy_term import PolicyBatch, PolicyTerm
from headwater.stages.rollouts import RolloutBatch, readable_rows
from headwater.stages.teacher_term import TeacherTerm
from headwater.types import LossSums
from headwater.verify.grading import Grade


def run(job: StageJob, context: StageContext) -> None:
    """Train `job.model_dir` on rewards and its problems' teachers for `config.steps` steps."""
    config = job.config
    assert isinstance(config, MixedStage)
    assert job.model_dir is not None and job.teacher_dir is not None
    for teacher_dir in (job.teacher_dir, *job.teachers.values()):
        check_same_tokenizer(job.model_dir, teacher_dir)
    updates = config.steps * config.updates_per_batch
    with Learner(job, context, total_steps=config.steps, updates=updates) as learner:
        trainer = _Mixed(learner, config)
        for step in learner.steps():
            trainer.step(step)
        learner.publish()


class _Mixed:
    def __init__(self, learner: Learner, config: MixedStage) -> None:
        self.learner, self.config = learner, config
        self.source = source_of(learner, config.sampling)
        temperature = self.source.sampling.temperature
        self.policy = PolicyTerm(learner, config, temperature)
        self.teacher = TeacherTerm(learner, config, config.divergence, temperature)
        self.rollouts = StepRollouts(
            learner, config, self.source, self.teacher.score, lambda s: config.lambda_at(s) < 1
        )

    def step(self, step: int) -> None:
        """One batch of rollouts and the updates on it."""
        config, learner = self.config, self.learner
        share = config.lambda_at(step)
        started = time.perf_counter()
        drawn = self.rollouts.take(step)
        texts, grades = self._read(drawn, graded=share > 0)
        sampled = time.perf_counter()
        metrics = {"lambda": share} | self.rollouts.lag(drawn)
        rewards_PG = advantages_N = None
        if grades is not None:
            rewards_PG = rewards_of(grades, len(drawn.problems))
            advantages_N = group_advantages(rewards_PG, config.advantage).reshape(-1)
            metrics |= grade_metrics(grades, rewards_PG)
        if share < 1:
            self.teacher.prepare(drawn.scores)
        metrics |= self._update(drawn, rewards_PG, advantages_N, share)
        now = time.perf_counter()
        metrics |= drawn.batch.shape_metrics() | {
            "sampling_seconds": sampled - started,
            "training_seconds": now - sampled,
            "tokens_per_second": int(drawn.batch.lengths_N.sum()) / (now - started),
        }
        job, advantages = learner.job, None if advantages_N is None else advantages_N.tolist()
        rows = readable_rows(job, step, drawn.batch, texts, drawn.problems, grades, advantages)
        learner.record(step, metrics, rows)

    def _read(self, drawn: Drawn, *, graded: bool) -> tuple[list[str], list[Grade] | None]:
        """Texts of the rollouts, charged, and their grades where lambda has a use for them."""
        learner = self.learner
        if graded:
            found = grade_groups(learner, self.source, drawn.problems, drawn.batch.groups)
            _, _, texts, grades = apart(found)
            return texts, grades
        learner.charge_sampling(len(drawn.problems), int(drawn.batch.lengths_N.sum()))
        return [self.source.text(rollout) for rollout in drawn.batch.rollouts], None

    def _update(
        self,
        drawn: Drawn,
        rewards_PG: torch.Tensor | None,
        advantages_N: torch.Tensor | None,
        share: float,
    ) -> dict[str, float]:
        """All updates on a batch; rewards and advantages are None where nothing was graded."""
        config, learner, batch = self.config, self.learner, drawn.batch
        weights_N, denominator = batch.token_weights(
            config.normalization, self.source.sampling.max_new_tokens
        )
        keep, policy = None, None
        if rewards_PG is not None and advantages_N is not None:
            policy = self.policy.of(batch, advantages_N, weights_N)
            all_teach = share < 1 or config.kl.coefficient > 0
            keep = [all_teach or not flat for flat in zero_variance(rewards_PG).tolist()]
        groups = batch.packed(keep, self.teacher.numbers(drawn.problems) if share < 1 else None)
        if not groups:
            for _ in range(config.updates_per_batch):
                learner.updater.skip()
                learner.charge_training(0)
            return {"grad_norm": 0.0, "loss": 0.0, "trained_tokens": 0.0}
        learner.resting = self._resting(share)
        metrics: dict[str, float] = {}
        tokens = sum(group.tokens for group in groups)
        loss_of = partial(self._loss, batch, weights_N, policy, share)
        for number in range(config.updates_per_batch):
            if policy is not None:
                policy.begin(number)
            result = learner.update(groups, denominator, loss_of)
            metrics = dict(result.metrics) | {"loss": result.loss, "grad_norm": result.grad_norm}
            metrics["trained_tokens"] = float(tokens * (number + 1))
            learner.charge_training(tokens)
            if policy is not None:
                self.policy.charge(tokens)
            if share < 1:
                self.teacher.charge(groups)
        return metrics

    def _resting(self, share: float) -> tuple[FrozenModel, ...]:
        """Frozen models that have no say at this lambda."""
        teachers = ((model, share < 1) for model in self.teacher.local)
        frozen = ((self.policy.reference, share > 0), *teachers)
        return tuple(model for model, asked in frozen if model is not None and not asked)

    def _loss(
        self,
        batch: RolloutBatch,
        weights_N: torch.Tensor,
        policy: PolicyBatch | None,
        share: float,
        micro: Sequence[PackedGroup],
    ) -> LossSums:
        learner, temperature = self.learner, self.source.sampling.temperature
        tokens = pack(micro, dtype=learner.dtype, device=learner.device)
        loss = None if policy is None else policy.chunk_loss(micro, tokens)
        if share < 1:
            loss = mixed_loss(
                loss,
                self.teacher.chunk_loss(batch, weights_N, micro, tokens),
                reward_weight=share,
                dense_weight=(1.0 - share) * self.config.beta,
                temperature=temperature,
            )
            temperature = 1.0  # the reward's own is applied where the two meet
        assert loss is not None
        hidden = hidden_at_targets(learner.model, tokens, batch.known(micro, tokens))
        head = head_weight(learner.model, learner.vocab_size)
        return chunked_head_loss(hidden, head, loss, temperature=temperature)
