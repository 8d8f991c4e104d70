"""A frozen model that scores other models' tokens: teacher or reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.packing import TokenBatch
from headwater.engine.sharding import Sharding, shard
from headwater.losses.chunked_head import ChunkLoss, chunked_head_loss
from headwater.losses.divergences import top_k_logprobs
from headwater.types import FullTargets, LossSums, TopKTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A model without gradients; its vocabulary is cut to the tokenizer's own tokens."""

    model: PreTrainedModel
    vocab_size: int
    parameters: int

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
        sharding: Sharding | None = None,
    ) -> FrozenModel:
        """Load a model folder for scoring; with `sharding`, spread over ranks, which then score
        together."""
        model = load_engine_model(path, dtype, device if sharding is None else torch.device("cpu"))
        model.requires_grad_(False)
        parameters = sum(p.numel() for p in model.parameters())
        if sharding is not None:
            shard(model, sharding)
        return cls(model, vocab_size, parameters)

    @property
    def head_VH(self) -> torch.Tensor:
        """The output head [V, H]; of a sharded model only once it has been run."""
        return head_weight(self.model, self.vocab_size)

    def targets(self, batch: TokenBatch) -> FullTargets:
        """The whole distribution at every target, as hidden states and the head."""
        with torch.no_grad():
            return FullTargets(hidden_at_targets(self.model, batch), self.head_VH)

    def top_k(self, batch: TokenBatch, k: int, temperature: float = 1.0) -> TopKTargets:
        """The k most likely tokens at every target; logits exist a chunk at a time."""
        ids, logprobs = [], []

        def collect(
            logits_CV: torch.Tensor, part: slice, wants_gradient: bool
        ) -> tuple[LossSums, None]:
            found = top_k_logprobs(logits_CV, k)
            ids.append(found[0])
            logprobs.append(found[1])
            return LossSums(logits_CV.new_zeros(()), 0.0), None

        self._chunks(batch, collect, temperature)
        return TopKTargets(torch.cat(ids), torch.cat(logprobs))

    def logprobs(self, batch: TokenBatch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the targets, float32 [T], nats."""
        found = []

        def collect(
            logits_CV: torch.Tensor, part: slice, wants_gradient: bool
        ) -> tuple[LossSums, None]:
            picked = logits_CV.gather(-1, batch.target_ids_T[part, None])[:, 0]
            found.append(picked - torch.logsumexp(logits_CV, dim=-1))
            return LossSums(logits_CV.new_zeros(()), 0.0), None

        self._chunks(batch, collect, temperature)
        return torch.cat(found)

    def _chunks(self, batch: TokenBatch, collect: ChunkLoss, temperature: float) -> None:
        with torch.no_grad():
            hidden = hidden_at_targets(self.model, batch)
            chunked_head_loss(hidden, self.head_VH, collect, temperature=temperature)
