"""Calling the compiled kernels: products on packed weights."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import lru_cache

import torch

from headwater.engine.kernel_build import built, openmp, switched_off

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64
_Count = ctypes.c_int32


class Team(ctypes.Structure):
    """`team` in products.h."""

    _fields_ = (
        ("parallel", _Pointer),
        ("barrier", _Pointer),
        ("thread", _Pointer),
        ("count", _Pointer),
        ("threads", _Count),
    )


class _Target(ctypes.Structure):
    _fields_ = (
        ("out", _Pointer),
        ("out_stride", _Size),
        ("bias", _Pointer),
        ("plus", _Pointer),
        ("plus_stride", _Size),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        ("team", Team),
        ("x", _Pointer),
        ("weight", _Pointer),
        ("x_stride", _Size),
        ("rows", _Count),
        ("inner", _Count),
        ("columns", _Count),
        ("to", _Target),
    )


class _Packing(ctypes.Structure):
    _fields_ = (
        ("team", Team),
        ("weight", _Pointer),
        ("packed", _Pointer),
        ("inner", _Count),
        ("columns", _Count),
    )


class _Drawing(ctypes.Structure):
    _fields_ = (
        ("team", Team),
        ("logits", _Pointer),
        ("uniforms", _Pointer),
        ("forbidden", _Pointer),
        ("forbidden_count", _Count),
        ("rows", _Count),
        ("vocabulary", _Count),
        ("temperature", ctypes.c_float),
        ("tokens", _Pointer),
        ("logprobs", _Pointer),
    )


class Kernels:
    """The kernels of one number format; arrays on the CPU, in that format unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        #: Columns of a packed block: numbers in a vector.
        self.lanes = _Count.in_dll(library, "hw_lanes").value
        runtime = openmp()
        names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        self._functions = [
            ctypes.cast(getattr(runtime, name), _Pointer) for name in names if runtime
        ]

    def team(self) -> Team:
        """As many threads as torch uses now."""
        if not self._functions:
            return Team(threads=1)
        return Team(*self._functions, torch.get_num_threads())

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] as the kernels read it: flat, `out` filled up to whole blocks."""
        columns, inner = weight.shape
        weight = weight.contiguous()
        packed = weight.new_empty(self._filled(columns) * inner)
        task = _Packing(self.team(), weight.data_ptr(), packed.data_ptr(), inner, columns)
        self.library.hw_pack(ctypes.byref(task))
        return packed

    def _filled(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, in] times a packed weight, [B, columns]; plus a bias, float32 [columns], or plus
        `plus` [B, columns].

        Raises ValueError for an x of another format or width than the weight's.
        """
        filled = self._filled(columns)
        if x.dtype != packed.dtype or filled * x.shape[1] != packed.numel():
            raise ValueError(
                f"x of {x.dtype} {tuple(x.shape)} for a packed weight of {packed.dtype} with "
                f"{packed.numel() // filled} columns; expected the same format and width"
            )
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(x.shape[0], columns)
        to = _Target(out.data_ptr(), columns)
        if bias is not None:
            to.bias = bias.data_ptr()
        elif plus is not None:
            plus = plus if plus.stride(1) == 1 else plus.contiguous()
            to.plus, to.plus_stride = plus.data_ptr(), plus.stride(0)
        task = _Linear(
            self.team(), x.data_ptr(), packed.data_ptr(), x.stride(0), *x.shape, columns, to
        )
        self.library.hw_linear(ctypes.byref(task))
        return out

    def draw(
        self,
        logits: torch.Tensor,
        uniforms: torch.Tensor,
        temperature: float,
        forbidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B] and their log-probabilities, float32 [B], by the inverse of the
        cumulative distribution of logits [B, V], contiguous, at a temperature above 0.

        uniforms: float32 [B] in (0, 1). forbidden: int64 tokens that have no probability; their
        logits are overwritten.
        """
        rows, vocabulary = logits.shape
        tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        uniforms = uniforms.to(torch.float32).contiguous()
        task = _Drawing(
            self.team(),
            logits.data_ptr(),
            uniforms.data_ptr(),
            forbidden.data_ptr(),
            forbidden.shape[0],
            rows,
            vocabulary,
            temperature,
            tokens.data_ptr(),
            logprobs.data_ptr(),
        )
        self.library.hw_draw(ctypes.byref(task))
        return tokens, logprobs


def beside_torch(dtype: torch.dtype) -> float | None:
    """How many times as fast as torch's a decoding step's product is, measured in a few
    milliseconds; None where this machine has no kernels for the format."""
    rows, inner, columns = 16, 576, 960
    x, weight = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    kernels = kernels_for(weight)
    if kernels is None:
        return None
    packed = kernels.pack(weight)
    with torch.inference_mode():
        ours = _least_seconds(lambda: kernels.linear(x, packed, columns))
        return _least_seconds(lambda: torch.nn.functional.linear(x, weight)) / ours


def _least_seconds(do: Callable[[], object]) -> float:
    found = []
    for _ in range(20):
        began = time.perf_counter()
        do()
        found.append(time.perf_counter() - began)
    return min(found)


def kernels_of(values: torch.Tensor) -> Kernels | None:
    """The kernels for values of this format and device, where this machine has them."""
    if values.device.type != "cpu" or switched_off():
        return None
    return _kernels(values.dtype)


def kernels_for(weight: torch.Tensor) -> Kernels | None:
    """The kernels that multiply with a weight [out, in], where this machine has them."""
    return None if weight.shape[1] % 2 else kernels_of(weight)


@lru_cache
def _kernels(dtype: torch.dtype) -> Kernels | None:
    library = built(dtype).library
    return None if library is None else Kernels(library)
