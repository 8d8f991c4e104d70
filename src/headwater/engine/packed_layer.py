"""One layer of known structure made ready to sample, with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from headwater.engine.fused_layers import LayerParameters, LayerShape, rms_norm, widened
from headwater.engine.packed_linear import PackedLinear

#: What attention reads, [B, M*R * D]: given queries, scaled, then keys and values [B, X, D].
Reader = Callable[[torch.Tensor], torch.Tensor]
#: Takes what a layer came to, in the columns of `RecordedShape`.
Writer = Callable[[Sequence[torch.Tensor]], None]


class PackedLayer:
    """One known layer: queries, keys and values in one product.

    Queries and keys have the two halves of a head interleaved, so that a position's rotation is
    one product of complex numbers. Scores do not depend on the order within a head.
    """

    def __init__(self, weights: LayerParameters, shape: LayerShape) -> None:
        self.shape = shape
        self.norm, self.mlp_norm = widened(weights.norm), widened(weights.mlp_norm)
        self._rotated_heads = (weights.q.shape[0] + weights.k.shape[0]) // shape.head_dim
        dim = shape.head_dim
        biases = [weights.q_bias, weights.k_bias, weights.v_bias]
        self.qkv = PackedLinear(
            _interleaved(weights.q, dim),
            _interleaved(weights.k, dim),
            weights.v,
            biases=(
                *(b if b is None else _interleaved(b, dim) for b in biases[:2]),
                biases[2],
            ),
        )
        self.o = PackedLinear(weights.o)
        self.gate_up = PackedLinear(weights.gate, weights.up)
        self.down = PackedLinear(weights.down)
        self.head_norms = _head_norms(weights, dim)

    def __call__(
        self,
        x: torch.Tensor,
        cis_BXd: torch.Tensor,
        reader: Reader,
        writer: Writer | None = None,
    ) -> torch.Tensor:
        rows, eps, dim = x.shape[0], self.shape.eps, self.shape.head_dim
        normed = rms_norm(x, self.norm, eps)
        qkv = self.qkv(normed).view(rows, -1, dim // 2, 2)
        raw = []
        if writer is not None and self.head_norms is not None:
            raw = [qkv[:, : self._rotated_heads].flatten(1).clone()]
        wide = widened(qkv)
        if self.head_norms is not None:
            heads = wide[:, : self._rotated_heads].flatten(2)
            scale = heads.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            heads.mul_(scale).mul_(self.head_norms)
        torch.view_as_complex(wide).mul_(cis_BXd)
        rotated = wide.to(x.dtype).flatten(2)
        read = reader(rotated)
        middle = self.o.plus(read, x)
        normed = rms_norm(middle, self.mlp_norm, eps)
        gate_up = self.gate_up(normed)
        gate, up = gate_up.chunk(2, dim=1)
        out = self.down.plus(functional.silu(gate).mul_(up), middle)
        if writer is not None:
            writer((rotated.flatten(1), read, middle, gate_up, out, *raw))
        return out


def _interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Weight [heads * D, in], bias or norm [heads * D]: the halves of a head by turns."""
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


def _head_norms(weights: LayerParameters, head_dim: int) -> torch.Tensor | None:
    """Norm weights of every query and key head, interleaved: float32 or better [heads, D]."""
    if weights.q_norm is None or weights.k_norm is None:
        return None
    pairs = ((weights.q_norm, weights.q), (weights.k_norm, weights.k))
    rows = [_interleaved(norm, head_dim).expand(w.shape[0] // head_dim, -1) for norm, w in pairs]
    return widened(torch.cat(rows))
