"""Running a model's body and finding its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from headwater.engine.attention import Attend, attend
from headwater.engine.decoding import DecodeLayout
from headwater.engine.fused_layers import Known, fuse_layers
from headwater.engine.layout import PackedLayout
from headwater.engine.packing import TokenBatch
from headwater.engine.sharding import is_sharded
from headwater.errors import InputError
from headwater.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The name under which transformers finds the engine's attention.
ATTENTION_NAME = "headwater"


def load_engine_model(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in the folder `path`, with the engine's attention and fused layers.

    Raises InputError as `load_model` does.
    """
    model = load_model(path, dtype=dtype, device=str(device), attn_implementation=ATTENTION_NAME)
    fuse_layers(model)
    return model


def head_weight(model: PreTrainedModel, vocab_size: int | None = None) -> torch.Tensor:
    """Output head [V, H], cut to the first `vocab_size` rows (the tokenizer's own tokens)."""
    weight = model.get_output_embeddings().weight
    # a slice, whole as it may be, costs its gradient a copy
    return weight if vocab_size in (None, weight.shape[0]) else weight[:vocab_size]


def hidden_at_targets(
    model: PreTrainedModel, batch: TokenBatch, known: Known | None = None
) -> torch.Tensor:
    """Final hidden states [T, H] that predict `batch.target_ids_T`, prompt computed once.

    known: what the model's layers came to on just these tokens, where that need not be computed
    again.
    """
    hidden = hidden_states(model, batch.input_ids, batch.position_ids, batch.layout, known)
    return hidden.index_select(0, batch.predict_index_T)


def hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    layout: PackedLayout | DecodeLayout,
    known: Known | None = None,
) -> torch.Tensor:
    """Final hidden states [tokens, H] of a flat row; ids and positions int64 [1, tokens]."""
    body = model if is_sharded(model) else model.get_decoder()
    out = body(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, layout=layout, known=known
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: PackedLayout | DecodeLayout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in the attention of layers that are not fused."""
    if layout is None:
        raise InputError(
            "attention 'headwater' was called without a layout; load the model with "
            "attn_implementation='sdpa' to use it outside headwater's engine"
        )
    if sliding_window is not None:
        raise InputError(
            f"this model attends in a sliding window of {sliding_window}, expected full "
            "attention; use a model without sliding windows"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(layout, DecodeLayout):
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return layout.attend(layer, torch.cat((q * scaling, k, v), 1))[None], None
    if torch.is_grad_enabled():
        return Attend.apply(layout, q, k, v, scaling)[None], None
    return attend(layout, q, k, v, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)
