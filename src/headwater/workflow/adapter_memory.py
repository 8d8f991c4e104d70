"""How many numbers a stage with adapters trains and keeps (`engine.adapters`), from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.config.lora import LoRA
from headwater.models.size import ModelSize

#: NF4: half a byte a weight, and a float32 scale for 64 of them.
NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """adapted: weights that have adapters; parameters: of A and B together."""

    adapted: int
    parameters: int

    def base_bytes(self, lora: LoRA, value_bytes: int) -> int:
        """What is kept of the adapted weights as they came, beside those that compute."""
        return round(self.adapted * (NF4_BYTES if lora.base == "nf4" else value_bytes))


def adapter_size(size: ModelSize, lora: LoRA) -> AdapterSize:
    """Of a model of the Llama family, whose linear layers are the seven projections."""
    keys = size.kv_values_per_token // size.layers // 2
    shapes = {
        "q_proj": (size.attention_width, size.hidden),
        "k_proj": (keys, size.hidden),
        "v_proj": (keys, size.hidden),
        "o_proj": (size.hidden, size.attention_width),
        "gate_proj": (size.intermediate, size.hidden),
        "up_proj": (size.intermediate, size.hidden),
        "down_proj": (size.hidden, size.intermediate),
    }
    targets = shapes if lora.target_modules == "all-linear" else lora.target_modules
    chosen = [shapes[name] for name in targets]
    return AdapterSize(
        adapted=size.layers * sum(out * into for out, into in chosen),
        parameters=size.layers * sum(lora.rank * (out + into) for out, into in chosen),
    )
