"""Running a model's body and finding its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwater.engine.attention import DecodeLayout
from headwater.engine.packing import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_weight(model: PreTrainedModel, vocab_size: int | None = None) -> torch.Tensor:
    """Output head [V, H], cut to the first `vocab_size` rows (the tokenizer's own tokens)."""
    weight = model.get_output_embeddings().weight
    return weight if vocab_size is None else weight[:vocab_size]


def hidden_at_targets(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """Final hidden states [T, H] that predict `batch.target_ids_T`, prompt computed once."""
    body = model.get_decoder()
    out = body(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        layout=batch.layout,
    )
    return out.last_hidden_state[0].index_select(0, batch.predict_index_T)


def hidden_of_step(
    model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, layout: DecodeLayout
) -> torch.Tensor:
    """Final hidden states [B, H] of one new token a row; ids, positions int64 [B]."""
    out = model.get_decoder()(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout
    )
    return out.last_hidden_state[0]
