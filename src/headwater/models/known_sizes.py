"""Published architectures, so that a study can be planned without the models at hand.

Values of each config.json as far as a size needs them. Used for planning only, and only for a
hub model that is not in a local folder: whatever is trained is read from its own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }


def _llama3(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def _smollm2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
    }


_ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, tied=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, tied=True),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, tied=False),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64, tied=False),
    "meta-llama/Llama-3.3-70B": _llama3(8192, 28672, 80, 64, tied=False),
}
_VARIANTS = ("-Base", "-Instruct")


def known_config(hub_id: str) -> dict[str, Any] | None:
    """The published config values of a hub model or of its base or instruct variant, or None.

    >>> known_config("Qwen/Qwen3-8B-Base")["hidden_size"], known_config("some/model")
    (4096, None)
    """
    for variant in _VARIANTS:
        hub_id = hub_id.removesuffix(variant)
    found = _ARCHITECTURES.get(hub_id)
    return None if found is None else dict(found)
