"""What rewards say of a step's rollouts: the clipped surrogate, and the KL to the start if any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headwater.config.stages import GRPOStage, MixedStage
from headwater.engine.packing import PackedGroup, TokenBatch
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.token_losses import PolicySettings, PolicyTerms, policy_loss
from headwater.stages.learner import Learner
from headwater.stages.rollouts import RolloutBatch


class PolicyTerm:
    """The policy-gradient loss of a stage. temperature: of its rollouts, and of the policy."""

    def __init__(
        self, learner: Learner, config: GRPOStage | MixedStage, temperature: float
    ) -> None:
        assert learner.job.model_dir is not None
        self.learner, self.config, self.temperature = learner, config, temperature
        wanted = config.kl.coefficient > 0
        self.reference = learner.frozen(learner.job.model_dir) if wanted else None

    def charge(self, tokens: int) -> None:
        """Count what the reference read."""
        if self.reference is not None:
            self.learner.charge(flops=2.0 * self.reference.parameters * tokens)

    def of(
        self, batch: RolloutBatch, advantages_N: torch.Tensor, weights_N: torch.Tensor
    ) -> PolicyBatch:
        """The loss of one batch of rollouts, for all updates on it."""
        memory = _Memory(self.learner.device, keeps=self.config.updates_per_batch > 1)
        return PolicyBatch(self, batch, advantages_N, weights_N, memory)

    def settings(self, tokens: TokenBatch) -> PolicySettings:
        """Settings of the loss; of an exact KL with the reference's distribution at `tokens`."""
        config = self.config
        exact = self.reference is not None and config.kl.estimator == "exact"
        return PolicySettings(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            kl_coefficient=config.kl.coefficient,
            kl_estimator=config.kl.estimator,
            reference=self.reference.targets(tokens) if exact and self.reference else None,
            temperature=self.temperature,
        )

    def reference_logprobs(self, tokens: TokenBatch) -> torch.Tensor | None:
        """The reference's log-probabilities [T] where an estimator on samples wants them."""
        if self.reference is None or self.config.kl.estimator == "exact":
            return None
        return self.reference.logprobs(tokens, self.temperature)


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """The loss of a batch's rollouts; its first update remembers their log-probabilities."""

    term: PolicyTerm
    batch: RolloutBatch
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    memory: _Memory

    def begin(self, update: int) -> None:
        """Say which update on the batch (from 0) comes next."""
        self.memory.first = update == 0

    def chunk_loss(self, micro: Sequence[PackedGroup], tokens: TokenBatch) -> ChunkLoss:
        """The loss of a micro-batch, on logits at the policy's temperature.

        Asks the reference: call it before the model's own forward pass.
        """
        batch, settings = self.batch, self.term.settings(tokens)
        terms = PolicyTerms(
            targets_T=tokens.target_ids_T,
            advantages_T=batch.per_token(self.advantages_N, tokens.row_T),
            weights_T=batch.per_token(self.weights_N, tokens.row_T),
            sampler_logprobs_T=batch.sampler_logprobs(tokens.rows, self.term.learner.device),
            old_logprobs_T=self.memory.old_logprobs(tokens.rows),
            reference_logprobs_T=self.term.reference_logprobs(tokens),
        )
        return policy_loss(terms, settings, self.memory.callback(micro))


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
