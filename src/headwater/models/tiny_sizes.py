"""Sizes of the embedded models, as plain numbers: planning reads them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headwater.errors import InputError
from headwater.near_names import near

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_TOKEN, START_TOKEN, END_TOKEN = SPECIAL_TOKENS
ROLES = ("system", "user", "assistant")
CHARACTERS = "\n 0123456789+-*/=()%,.;:?<>|#abcdefghijklmnopqrstuvwxyz"
BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"

VOCABULARY = (*SPECIAL_TOKENS, *ROLES, *CHARACTERS, BOX_OPEN, BOX_CLOSE)
"""Tokens of the embedded models in the order of their ids."""

MAX_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class TinySize:
    """Shape of an embedded model: hidden and MLP width, layers, query and key/value heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 32  # the smallest that vLLM's CPU attention takes


TINY_SIZES: dict[str, TinySize] = {
    "student": TinySize(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=192),
    "small": TinySize(hidden=64, layers=3, heads=2, kv_heads=1, intermediate=192),
    "teacher": TinySize(hidden=96, layers=3, heads=3, kv_heads=1, intermediate=288),
    "large": TinySize(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384),
}


def tiny_size(name: str) -> TinySize:
    """The size called `name`, which may carry the prefix "tiny:".

    Raises InputError for an unknown name.
    """
    size = TINY_SIZES.get(name.removeprefix("tiny:"))
    if size is None:
        choices = ", ".join(f"tiny:{known}" for known in TINY_SIZES)
        hint = near(name.removeprefix("tiny:"), TINY_SIZES)
        raise InputError(
            f"unknown embedded model {name!r}: expected one of {choices}; choose one{hint}"
        )
    return size


def tiny_config_values(name: str) -> dict[str, Any]:
    """What config.json says of the embedded model `name` (Qwen3 field names).

    Raises InputError for an unknown name.
    """
    size = tiny_size(name)
    return {
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        # The usual 0.02 is made for wide models; at this width it costs hundreds of steps.
        "initializer_range": round(size.hidden**-0.5, 4),
        "pad_token_id": VOCABULARY.index(PAD_TOKEN),
        "eos_token_id": VOCABULARY.index(END_TOKEN),
    }
