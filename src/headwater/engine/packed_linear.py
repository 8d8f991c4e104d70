"""Matrix products of few rows, on weights laid out for the CPU's matrix kernels.

Packed weights are copies where packing changes anything. They are made for one call of a sampler
and dropped with it, so that they cannot be older than the model, and cost about what one step of
decoding does.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch.nn import functional


class PackedLinear:
    """x @ weight.T (+ bias), the weight laid out for the CPU's matrix kernels where there are any.

    weights [out_i, in] are put one under the other. What follows a product can be part of it.
    """

    def __init__(
        self, *weights: torch.Tensor, biases: tuple[torch.Tensor | None, ...] = ()
    ) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        present = [bias for bias in biases if bias is not None]
        self._bias = torch.cat(present) if present else None
        self._packs = _packs(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in] to [B, out]."""
        if self._packs:
            return self._packed(x, "none")
        return functional.linear(x, self._weight, self._bias)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """SiLU of the product."""
        if self._packs:
            return self._packed(x, "swish")
        return functional.silu(self(x), inplace=True)

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product times `other` [B, out]."""
        if self._packs:
            return self._packed_with(x, other, "mul")
        return self(x).mul_(other)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product plus `other` [B, out]."""
        if self._packs:
            return self._packed_with(x, other, "add")
        return self(x).add_(other)

    def _packed(self, x: torch.Tensor, after: str) -> torch.Tensor:
        found: torch.Tensor = _pointwise(x, self._weight, self._bias, after, [], "")
        return found

    def _packed_with(self, x: torch.Tensor, other: torch.Tensor, after: str) -> torch.Tensor:
        found: torch.Tensor = _pointwise_with(x, other, self._weight, self._bias, after)
        return found


# The overloads themselves: to have torch choose one at every call costs as much as a small op.
# Builds of torch for other processors may lack them.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_pointwise: Any = getattr(_LINEAR, "default", None)
_pointwise_with: Any = getattr(_LINEAR, "binary", None)


def _packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs this weight here: float32 or bfloat16 on an x86 CPU that has it."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and _LINEAR is not None
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
