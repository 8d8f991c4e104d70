"""A model made ready to decode: one token a row, with weights packed for few rows.

Packed weights are copies. They are made for one call of a sampler and dropped with it, so that
they cannot be older than the model, and cost about what one step of decoding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from headwater.engine.decoding import DecodeLayout
from headwater.engine.forward import head_weight, hidden_states
from headwater.engine.fused_layers import (
    LayerParameters,
    LayerShape,
    Rotary,
    half_table,
    parameters_of,
    rms_norm,
    rotate,
    shape_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLinear:
    """x @ weight.T (+ bias), the weight laid out for the CPU's matrix kernels where there are any.

    weights [out_i, in] are put one under the other.
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
        if not self._packs:
            return functional.linear(x, self._weight, self._bias)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return found


def _packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs this weight here: float32 or bfloat16 on a CPU it supports."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Decoder(Protocol):
    """What the sampler needs of a model, a step at a time."""

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        """Final hidden states [B, H] of one new token a row; ids and positions int64 [B]."""
        ...

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] in at least float32."""
        ...


def decoder_of(model: PreTrainedModel, vocab_size: int) -> Decoder:
    """The decoder that suits the model's layers; make a new one when its weights change.

    On a GPU its steps are recorded once for every shape and played back.
    """
    layers = [parameters_of(layer) for layer in model.get_decoder().layers]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers):
        return _LibraryDecoder(model, vocab_size)
    packed = _PackedDecoder(model, known, vocab_size)
    return RecordedSteps(packed, record_cuda_graph) if packed.device.type == "cuda" else packed


#: Runs a function of tensors, and returns how to run it again on what those tensors hold then.
Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def record_cuda_graph(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record `compute` as a CUDA graph, after one run on a side stream as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


class RecordedSteps:
    """A decoder whose steps are recorded: a new recording whenever the layout's tensors change."""

    def __init__(self, decoder: Decoder, record: Record) -> None:
        self._decoder, self._record = decoder, record
        self._recorded: tuple[DecodeLayout, int] | None = None
        self._replay: Callable[[], torch.Tensor] | None = None

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        if self._recorded != (layout, layout.generation) or self._replay is None:
            self._replay = None  # frees the old recording's memory first
            self._ids, self._positions = ids_B.clone(), positions_B.clone()
            lengths = layout.lengths_kept()
            self._replay = self._record(
                lambda: self._decoder.step(self._ids, self._positions, layout)
            )
            layout.restore_lengths(lengths)
            self._recorded = (layout, layout.generation)
        self._ids.copy_(ids_B)
        self._positions.copy_(positions_B)
        return self._replay()

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden_BH)


class _LibraryDecoder:
    """Layers of unknown structure, as the library computes them."""

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self._model = model
        self._head = PackedLinear(head_weight(model, vocab_size))

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        layout.begin()
        hidden = hidden_states(self._model, ids_B[None], positions_B[None], layout)
        layout.end()
        return hidden

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return _widened(self._head(hidden_BH))


class _PackedLayer:
    """One known layer: queries, keys and values in one product, gate and up in another."""

    def __init__(self, weights: LayerParameters, shape: LayerShape) -> None:
        self._weights, self._shape = weights, shape
        self._kv_width = weights.k.shape[0]
        biases = (weights.q_bias, weights.k_bias, weights.v_bias)
        self._qkv = PackedLinear(weights.q, weights.k, weights.v, biases=biases)
        self._o = PackedLinear(weights.o)
        self._gate_up = PackedLinear(weights.gate, weights.up)
        self._down = PackedLinear(weights.down)

    def __call__(
        self, x: torch.Tensor, rotary: Rotary, index: int, layout: DecodeLayout
    ) -> torch.Tensor:
        w, shape = self._weights, self._shape
        qkv = self._qkv(rms_norm(x, w.norm, shape.eps)).view(x.shape[0], -1, shape.head_dim)
        kv_heads = self._kv_width // shape.head_dim
        if w.q_norm is None or w.k_norm is None:
            rotated = rotate(qkv[:, :-kv_heads], rotary)
            q, k = rotated[:, :-kv_heads], rotated[:, -kv_heads:]
        else:
            q = rotate(rms_norm(qkv[:, : -2 * kv_heads], w.q_norm, shape.eps), rotary)
            raw_k = qkv[:, -2 * kv_heads : -kv_heads]
            k = rotate(rms_norm(raw_k, w.k_norm, shape.eps), rotary)
        read = layout.attend(index, q, k, qkv[:, -kv_heads:], shape.scaling)
        middle = self._o(read).add_(x)
        gate, up = self._gate_up(rms_norm(middle, w.mlp_norm, shape.eps)).chunk(2, dim=-1)
        return self._down(functional.silu(gate).mul_(up)).add_(middle)


class _PackedDecoder:
    """All layers of known structure, without the library's module calls between them."""

    def __init__(
        self, model: PreTrainedModel, layers: list[LayerParameters], vocab_size: int
    ) -> None:
        body = model.get_decoder()
        self._embedding = body.embed_tokens.weight
        self.device = self._embedding.device
        self._rotary = body.rotary_emb
        self._layers = [
            _PackedLayer(weights, shape_of(layer))
            for weights, layer in zip(layers, body.layers, strict=True)
        ]
        self._norm, self._eps = body.norm.weight, float(body.norm.variance_epsilon)
        self._head = PackedLinear(head_weight(model, vocab_size))
        self._head_dim = shape_of(body.layers[0]).head_dim

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        layout.begin()
        x = functional.embedding(ids_B, self._embedding)
        tables = self._rotary(x[None], positions_B[None])
        cos, sin = (half_table(table, self._head_dim) for table in tables)
        for index, layer in enumerate(self._layers):
            x = layer(x, (cos, sin), index, layout)
        layout.end()
        return rms_norm(x, self._norm, self._eps)

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return _widened(self._head(hidden_BH))


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
