"""Weights in 4-bit NF4 (arXiv:2305.14314), by bitsandbytes, which only this module knows."""

from __future__ import annotations

from typing import Any

import torch


class NF4:
    """A weight as NF4 leaves it: 4 bits a number, and a float32 scale for every 64 of them.

    As bitsandbytes has it in a model that it loads in 4 bits, without double quantisation.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        functional = _bitsandbytes()
        self._packed, self._state = functional.quantize_4bit(
            weight.contiguous(), quant_type="nf4", compress_statistics=False
        )

    def whole(self) -> torch.Tensor:
        """The weight, in the format it came in."""
        found: torch.Tensor = _bitsandbytes().dequantize_4bit(self._packed, self._state)
        return found

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._packed.nbytes + int(self._state.absmax.nbytes)


def _bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional
