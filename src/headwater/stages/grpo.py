"""GRPO: sample groups, grade them through the vault, push up what beat its group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from headwater.config.stages import GRPOStage
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, pack
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.grpo import group_advantages, zero_variance
from headwater.stages.ahead import StepRollouts, source_of
from headwater.stages.grading import Graded, apart, grade_groups, grade_metrics, rewards_of
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.policy_term import PolicyBatch, PolicyTerm
from headwater.stages.rollouts import ProblemStream, RolloutBatch, readable_rows
from headwater.types import LossSums, Problem
from headwater.verify.grading import Grade


def run(job: StageJob, context: StageContext) -> None:
    """Train `job.model_dir` for `config.steps` steps on the verifier's rewards."""
    config = job.config
    assert isinstance(config, GRPOStage)
    updates = config.steps * config.updates_per_batch
    with Learner(job, context, total_steps=config.steps, updates=updates) as learner:
        trainer = _GRPO(learner, config)
        for step in learner.steps():
            trainer.step(step)
        learner.publish()


class _GRPO:
    def __init__(self, learner: Learner, config: GRPOStage) -> None:
        job = learner.job
        self.learner, self.config = learner, config
        self.stream = ProblemStream(job.problems, job.seed, job.stream)  # of dynamic sampling
        self.source = source_of(learner, config.sampling)
        self.rollouts = (
            None if config.dynamic_sampling else StepRollouts(learner, config, self.source)
        )
        self.policy = PolicyTerm(learner, config, self.source.sampling.temperature)

    def step(self, step: int) -> None:
        """One batch of rollouts and the updates on it."""
        started = time.perf_counter()
        problems, batch, texts, grades, extra = self._collect(step)
        sampled = time.perf_counter()
        rewards_PG = rewards_of(grades, len(problems))
        advantages_N = group_advantages(rewards_PG, self.config.advantage).reshape(-1)
        metrics = self._update(batch, rewards_PG, advantages_N)
        tokens = int(batch.lengths_N.sum())
        now = time.perf_counter()
        metrics |= (
            batch.shape_metrics()
            | extra
            | grade_metrics(grades, rewards_PG)
            | {
                "sampling_seconds": sampled - started,
                "training_seconds": now - sampled,
                "tokens_per_second": tokens / (now - started),
            }
        )
        job, advantages = self.learner.job, advantages_N.tolist()
        rows = readable_rows(job, step, batch, texts, problems, grades, advantages)
        self.learner.record(step, metrics, rows)

    def _collect(
        self, step: int
    ) -> tuple[list[Problem], RolloutBatch, list[str], list[Grade], dict[str, float]]:
        """Rollouts and grades; with dynamic sampling, flat groups are replaced by new ones."""
        config, learner = self.config, self.learner
        if self.rollouts is not None:
            drawn = self.rollouts.take(step)
            graded = grade_groups(learner, self.source, drawn.problems, drawn.batch.groups)
            problems, _, texts, grades = apart(graded)
            return problems, drawn.batch, texts, grades, self.rollouts.lag(drawn)
        assert config.dynamic_sampling is not None
        rounds = 1 + config.dynamic_sampling.max_rounds
        kept: list[Graded] = []
        spare: list[Graded] = []
        for round_ in range(rounds):
            missing = config.prompts_per_step - len(kept)
            if missing == 0:
                break
            problems = self.stream.take(learner.cursor, missing)
            learner.cursor += missing
            groups = self.source.draw(problems, config.group_size, step * rounds + round_)
            for group in grade_groups(learner, self.source, problems, groups):
                useful = len({grade.reward for grade in group[3]}) > 1
                (kept if useful else spare).append(group)
        replaced = len(kept) + len(spare) - config.prompts_per_step
        kept = [*kept, *spare][: config.prompts_per_step]
        return *apart(kept), {"replaced_groups": float(replaced)}

    def _update(
        self, batch: RolloutBatch, rewards_PG: torch.Tensor, advantages_N: torch.Tensor
    ) -> dict[str, float]:
        config, learner = self.config, self.learner
        weights_N, denominator = batch.token_weights(
            config.normalization, self.source.sampling.max_new_tokens
        )
        has_signal = config.kl.coefficient > 0
        keep = [has_signal or not flat for flat in zero_variance(rewards_PG).tolist()]
        groups = batch.packed(keep)
        if not groups:
            for _ in range(config.updates_per_batch):
                learner.updater.skip()
                learner.charge_training(0)
            return {"grad_norm": 0.0, "loss": 0.0, "trained_tokens": 0.0}
        metrics: dict[str, float] = {}
        policy = self.policy.of(batch, advantages_N, weights_N)
        for number in range(config.updates_per_batch):
            policy.begin(number)
            result = learner.update(groups, denominator, partial(self._loss, policy))
            metrics = dict(result.metrics) | {"loss": result.loss, "grad_norm": result.grad_norm}
            tokens = sum(group.tokens for group in groups)
            metrics["trained_tokens"] = float(tokens * (number + 1))
            learner.charge_training(tokens)
            self.policy.charge(tokens)
        return metrics

    def _loss(self, policy: PolicyBatch, micro: Sequence[PackedGroup]) -> LossSums:
        learner = self.learner
        tokens = pack(micro, dtype=learner.dtype, device=learner.device)
        loss = policy.chunk_loss(micro, tokens)
        hidden = hidden_at_targets(learner.model, tokens, policy.batch.known(micro, tokens))
        head = head_weight(learner.model, learner.vocab_size)
        return chunked_head_loss(hidden, head, loss, temperature=self.policy.temperature)
