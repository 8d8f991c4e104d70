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

from headwater.engine.kernel_calls import Kernels, kernels_for


class PackedLinear:
    """x @ weight.T (+ bias), the weight laid out for the CPU's matrix kernels where there are any:
    our own, or oneDNN's.

    weights [out_i, in] are put one under the other.
    """

    def __init__(
        self, *weights: torch.Tensor, biases: tuple[torch.Tensor | None, ...] = ()
    ) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        present = [bias for bias in biases if bias is not None]
        self.bias = torch.cat(present) if present else None
        self.columns = weight.shape[0]
        self.kernels: Kernels | None = kernels_for(weight)
        self._in_onednn = self.kernels is None and _packs(weight)
        if self.kernels is not None:
            self.weight = self.kernels.pack(weight)
            self.bias = None if self.bias is None else self.bias.float()
        elif self._in_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in] to [B, out]."""
        if self.kernels is not None:
            return self.kernels.linear(x, self.weight, self.columns, bias=self.bias)
        if self._in_onednn:
            found: torch.Tensor = _pointwise(x, self.weight, self.bias, "none", [], "")
            return found
        return functional.linear(x, self.weight, self.bias)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product, of a weight without bias, plus `other` [B, out]."""
        if self.kernels is not None:
            return self.kernels.linear(x, self.weight, self.columns, plus=other)
        if self._in_onednn:
            found: torch.Tensor = _pointwise_with(x, other, self.weight, self.bias, "add")
            return found
        return self(x).add_(other)


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
