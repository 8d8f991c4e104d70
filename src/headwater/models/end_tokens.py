"""Which tokens end a response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end token first, then the others that the generation config names.

    Raises InputError for a model that names none: its responses would never end.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    extra = [configured] if isinstance(configured, int) else list(configured or ())
    ids = [tokenizer.eos_token_id, *extra]
    unique = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
    if not unique:
        raise InputError(
            "the model names no end token; set eos_token_id in its generation_config.json"
        )
    return unique
