"""A decoding step by the compiled kernels: all layers in one call.

B rows of the batch; H hidden; D head dimension; others as in `headwater.engine.decoding`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch

from headwater.engine.decoding import DecodeLayout
from headwater.engine.kernel_calls import Kernels, Team
from headwater.engine.packed_layer import PackedLayer
from headwater.engine.packed_linear import PackedLinear
from headwater.engine.recording import RecordedForward, RecordedShape

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64
_Count = ctypes.c_int32
_Number = ctypes.c_float


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, _Pointer)
        for name in (
            *("qkv", "o", "gate_up", "down", "norm", "mlp_norm", "qkv_bias", "head_norms"),
            *("own", "prompt", "work"),
        )
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("team", Team),
        *(
            (name, _Count)
            for name in (
                *("rows", "layers", "hidden", "intermediate", "query_heads", "kv_heads"),
                *("head_dim", "columns", "capacity", "prompts", "prompt_room"),
            )
        ),
        ("eps", _Number),
        ("scaling", _Number),
        ("line", _Size),
        *(
            (name, _Pointer)
            for name in (
                *("x", "cosine", "sine", "prompt_of_row", "lengths", "prompt_lengths"),
                *("normed", "active", "scratch"),
            )
        ),
        ("scratch_size", _Size),
        ("layer", _Pointer),
    )


#: Heads are whole vectors on every processor.
_HEAD_MULTIPLE = 16


def can_step(layers: Sequence[PackedLayer]) -> bool:
    """Whether the compiled kernels go through these layers: they are packed for them and alike,
    with heads of whole vectors."""
    kinds = {(astuple(layer.shape), layer.head_norms is None) for layer in layers}
    sizes = {tuple(one.columns for one in _linears(layer)) for layer in layers}
    packed = all(one.kernels is not None for layer in layers for one in _linears(layer))
    whole = all(layer.shape.head_dim % _HEAD_MULTIPLE == 0 for layer in layers)
    return packed and whole and len(kinds) == len(sizes) == 1


def _linears(layer: PackedLayer) -> tuple[PackedLinear, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


class CompiledStep:
    """Steps of the layers of one model; makes its working memory as rows and caches ask for it.

    Results of layers lie as `shape` says: in `recorded` if that is given, else in one piece of
    memory that every layer writes anew.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        shape: RecordedShape,
        recorded: RecordedForward | None,
    ) -> None:
        kernels = layers[0].qkv.kernels
        assert kernels is not None
        self._kernels: Kernels = kernels
        self._layers, self._shape, self._recorded = layers, shape, recorded
        self._widths = shape.columns()
        self._entries = (_Layer * len(layers))(*(_Layer(*_weights(one)) for one in layers))
        self._step = _Step(
            layers=len(layers),
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            columns=sum(self._widths),
            eps=layers[0].shape.eps,
            scaling=shape.scaling,
            layer=ctypes.addressof(self._entries),
        )
        self._seen: tuple[DecodeLayout, int] | None = None
        self._held: list[torch.Tensor] = []  # what the step points to; the caches are the layout's

    def __call__(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        """The last layer's result [B, H] for the embedded tokens x [B, H] and their rotations,
        float32 [B, D/2]. Every row's keys and values are written into the layout's cache."""
        if self._seen != (layout, layout.generation):
            self._prepare(x, layout)
        step, lengths = self._step, layout.lengths
        step.x, step.cosine, step.sine = x.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        step.lengths = lengths.data_ptr()
        last = len(self._layers) - 1
        lines = self._held[0] if self._recorded is None else self._recorded.lines(last)
        step.line = lines.storage_offset()
        self._kernels.library.hw_step(ctypes.byref(step))
        before = sum(self._widths[:5])
        return lines[:, before : before + self._shape.hidden]

    def _prepare(self, x: torch.Tensor, layout: DecodeLayout) -> None:
        """Point to the layout's tensors, and to memory for as many rows as it has."""
        shape, step, rows = self._shape, self._step, layout.rows
        own, prompts = layout.caches
        step.rows, step.capacity = rows, own[0].shape[3]
        step.prompts, step.prompt_room = prompts[0].shape[2], prompts[0].shape[3]
        repeats = shape.query_heads // shape.kv_heads
        keys = step.capacity + step.prompt_room + 3  # scores are made four at a time
        step.scratch_size = shape.head_dim * (2 * repeats + 1) + repeats * keys
        step.team = self._kernels.team()
        normed, active = x.new_empty(rows, shape.hidden), x.new_empty(rows, shape.intermediate)
        scratch = torch.empty(step.team.threads, step.scratch_size)
        groups = layout.prompt_of_rows, layout.prompt_lengths
        step.normed, step.active = normed.data_ptr(), active.data_ptr()
        step.scratch = scratch.data_ptr()
        step.prompt_of_row, step.prompt_lengths = (one.data_ptr() for one in groups)
        work = x.new_empty(rows if self._recorded is None else 0, step.columns)
        recorded = self._recorded
        for number, entry in enumerate(self._entries):
            entry.own, entry.prompt = own[number].data_ptr(), prompts[number].data_ptr()
            lines = work if recorded is None else recorded.lines(number)
            entry.work = lines.untyped_storage().data_ptr()
        self._held = [work, normed, active, scratch, *groups]
        self._seen = (layout, layout.generation)


def _weights(layer: PackedLayer) -> list[Any]:
    """Pointers in the order of `_Layer`."""
    packed = [one.weight for one in _linears(layer)]
    rest = [layer.norm, layer.mlp_norm, layer.qkv.bias, layer.head_norms]
    return [None if one is None else one.data_ptr() for one in (*packed, *rest)]
