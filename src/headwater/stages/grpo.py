"""GRPO: sample groups, grade them through the vault, push up what beat its group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from headwater.config.stages import GRPOStage
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, TokenBatch, pack
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.grpo import group_advantages, zero_variance
from headwater.losses.token_losses import PolicySettings, PolicyTerms, policy_loss
from headwater.stages.ahead import StepRollouts, serving_of
from headwater.stages.job import StageContext, StageJob
from headwater.stages.learner import Learner
from headwater.stages.rollouts import ProblemStream, RolloutBatch, RolloutSource, readable_rows
from headwater.types import LossSums, Problem, RolloutGroup, Verdict
from headwater.verify.grading import Grade

# A problem, its rollouts, their texts and what these earned.
_Graded = tuple[Problem, RolloutGroup, Sequence[str], list[Grade]]


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
        assert job.model_dir is not None
        self.learner, self.config = learner, config
        self.stream = ProblemStream(job.problems, job.seed, job.stream)  # of dynamic sampling
        self.source = RolloutSource(
            job,
            learner.model,
            learner.tokenizer,
            config.sampling,
            serving=serving_of(learner),
            on_fewer_rows=learner.halved_rows,
            world=learner.world,
        )
        self.rollouts = (
            None if config.dynamic_sampling else StepRollouts(learner, config, self.source)
        )
        self.reference = learner.frozen(job.model_dir) if config.kl.coefficient > 0 else None

    def step(self, step: int) -> None:
        """One batch of rollouts and the updates on it."""
        started = time.perf_counter()
        problems, batch, texts, grades, extra = self._collect(step)
        sampled = time.perf_counter()
        verdicts = [grade.verdict for grade in grades]
        rewards = torch.tensor([grade.reward for grade in grades])
        rewards_PG = rewards.view(len(problems), -1)
        metrics = self._update(batch, rewards_PG)
        tokens = int(batch.lengths_N.sum())
        now = time.perf_counter()
        count = len(verdicts)
        metrics |= (
            batch.shape_metrics()
            | extra
            | {
                "reward": float(rewards.mean()),
                "pass_rate": sum(v is Verdict.CORRECT for v in verdicts) / count,
                "zero_variance_share": float(zero_variance(rewards_PG).float().mean()),
                "unparseable_share": sum(v is Verdict.UNPARSEABLE for v in verdicts) / count,
                "timeout_share": sum(v is Verdict.TIMEOUT for v in verdicts) / count,
                "sampling_seconds": sampled - started,
                "training_seconds": now - sampled,
                "tokens_per_second": tokens / (now - started),
            }
        )
        rows = readable_rows(self.learner.job, step, batch, texts, problems, grades)
        self.learner.record(step, metrics, rows)

    def _collect(
        self, step: int
    ) -> tuple[list[Problem], RolloutBatch, list[str], list[Grade], dict[str, float]]:
        """Rollouts and grades; with dynamic sampling, flat groups are replaced by new ones."""
        config, learner = self.config, self.learner
        if self.rollouts is not None:
            drawn = self.rollouts.take(step)
            graded = self._grade(drawn.problems, drawn.batch.groups)
            return *_apart(graded), self.rollouts.lag(drawn)
        assert config.dynamic_sampling is not None
        rounds = 1 + config.dynamic_sampling.max_rounds
        kept: list[_Graded] = []
        spare: list[_Graded] = []
        for round_ in range(rounds):
            missing = config.prompts_per_step - len(kept)
            if missing == 0:
                break
            problems = self.stream.take(learner.cursor, missing)
            learner.cursor += missing
            groups = self.source.draw(problems, config.group_size, step * rounds + round_)
            for group in self._grade(problems, groups):
                useful = len({grade.reward for grade in group[3]}) > 1
                (kept if useful else spare).append(group)
        replaced = len(kept) + len(spare) - config.prompts_per_step
        kept = [*kept, *spare][: config.prompts_per_step]
        return *_apart(kept), {"replaced_groups": float(replaced)}

    def _grade(self, problems: Sequence[Problem], groups: Sequence[RolloutGroup]) -> list[_Graded]:
        learner, size = self.learner, self.config.group_size
        texts = [[self.source.text(r) for r in group.rollouts] for group in groups]
        assert learner.context.vault is not None
        generated = sum(len(r.response_ids) for g in groups for r in g.rollouts)
        learner.charge_sampling(len(problems), generated)
        requests = [
            (problem.id, text) for problem, own in zip(problems, texts, strict=True) for text in own
        ]
        grades = learner.context.vault.grade(learner.context.account, requests)
        return [
            (problem, group, own, grades[i * size : (i + 1) * size])
            for i, (problem, group, own) in enumerate(zip(problems, groups, texts, strict=True))
        ]

    def _update(self, batch: RolloutBatch, rewards_PG: torch.Tensor) -> dict[str, float]:
        config, learner = self.config, self.learner
        advantages_N = group_advantages(rewards_PG, config.advantage).reshape(-1)
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
            return {"grad_norm": 0.0, "loss": 0.0}
        metrics: dict[str, float] = {}
        memory = _Memory(learner.device, keeps=config.updates_per_batch > 1)
        loss_of = partial(self._loss, batch, advantages_N, weights_N, memory)
        for number in range(config.updates_per_batch):
            memory.first = number == 0
            result = learner.update(groups, denominator, loss_of)
            metrics = dict(result.metrics) | {"loss": result.loss, "grad_norm": result.grad_norm}
            tokens = sum(group.tokens for group in groups)
            learner.charge_training(tokens)
            if self.reference is not None:
                learner.charge(flops=2.0 * self.reference.parameters * tokens)
        return metrics

    def _loss(
        self,
        batch: RolloutBatch,
        advantages_N: torch.Tensor,
        weights_N: torch.Tensor,
        memory: _Memory,
        micro: Sequence[PackedGroup],
    ) -> LossSums:
        """One micro-batch forward; the first update of a batch remembers its log-probabilities."""
        learner = self.learner
        tokens = pack(micro, dtype=learner.dtype, device=learner.device)
        settings, reference_T = self._settings(tokens), self._reference_logprobs(tokens)
        hidden = hidden_at_targets(learner.model, tokens)
        terms = PolicyTerms(
            targets_T=tokens.target_ids_T,
            advantages_T=batch.per_token(advantages_N, tokens.row_T),
            weights_T=batch.per_token(weights_N, tokens.row_T),
            sampler_logprobs_T=batch.sampler_logprobs(tokens.rows, learner.device),
            old_logprobs_T=memory.old_logprobs(tokens.rows),
            reference_logprobs_T=reference_T,
        )
        return chunked_head_loss(
            hidden,
            head_weight(learner.model, learner.vocab_size),
            policy_loss(terms, settings, memory.callback(micro)),
            temperature=self.source.sampling.temperature,
        )

    def _settings(self, tokens: TokenBatch) -> PolicySettings:
        config = self.config
        exact = self.reference is not None and config.kl.estimator == "exact"
        return PolicySettings(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            kl_coefficient=config.kl.coefficient,
            kl_estimator=config.kl.estimator,
            reference=self.reference.targets(tokens) if exact and self.reference else None,
            temperature=self.source.sampling.temperature,
        )

    def _reference_logprobs(self, tokens: TokenBatch) -> torch.Tensor | None:
        if self.reference is None or self.config.kl.estimator == "exact":
            return None
        return self.reference.logprobs(tokens, self.source.sampling.temperature)


def _apart(
    graded: Sequence[_Graded],
) -> tuple[list[Problem], RolloutBatch, list[str], list[Grade]]:
    """Problems, their rollouts as one batch, and texts and grades in the order of its rows."""
    return (
        [problem for problem, *_ in graded],
        RolloutBatch(tuple(group for _, group, *_ in graded)),
        [text for *_, texts, _ in graded for text in texts],
        [grade for *_, grades in graded for grade in grades],
    )


class _Memory:
    """Keeps each row's first log-probabilities as the old policy of later updates of a batch.

    By rows, so that later updates may have other micro-batches than the first.
    """

    def __init__(self, device: torch.device, *, keeps: bool) -> None:
        self.first = True
        self._device, self._keeps = device, keeps
        self._old: dict[int, torch.Tensor] = {}

    def old_logprobs(self, rows: Sequence[int]) -> torch.Tensor | None:
        """The first log-probabilities of these rows' tokens, [T]; None in the first update."""
        return None if self.first else torch.cat([self._old[row] for row in rows])

    def callback(self, micro: Sequence[PackedGroup]) -> Callable[[torch.Tensor, slice], None]:
        """What the loss calls with each chunk's log-probabilities, in packing order."""
        rows = [row for group in micro for row in group.rows]
        lengths = [len(response) for group in micro for response in group.completions]
        into_T = torch.empty(sum(lengths), device=self._device)

        def remember(logprobs: torch.Tensor, part: slice) -> None:
            if not (self.first and self._keeps):
                return
            into_T[part] = logprobs
            if part.stop == len(into_T):
                self._old |= zip(rows, into_T.split(lengths), strict=True)

        return remember
