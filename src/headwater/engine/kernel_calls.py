"""Calling the compiled kernels: products on packed weights."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from headwater.engine.kernel_build import built, openmp, switched_off

#: Columns of a packed block.
LANES = 16
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


class Kernels:
    """The kernels of one number format; arrays on the CPU, in that format unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
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
        packed = weight.new_empty(-(-columns // LANES) * LANES * inner)
        task = _Packing(self.team(), weight.data_ptr(), packed.data_ptr(), inner, columns)
        self.library.hw_pack(ctypes.byref(task))
        return packed

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, in] times a packed weight, [B, columns]; plus a bias, float32 [columns], or plus
        `plus` [B, columns]."""
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


def kernels_for(weight: torch.Tensor) -> Kernels | None:
    """The kernels for weights [out, in] like this one, where this machine has them."""
    if weight.device.type != "cpu" or weight.shape[1] % 2 or switched_off():
        return None
    return _kernels_of(weight.dtype)


@lru_cache
def _kernels_of(dtype: torch.dtype) -> Kernels | None:
    library = built(dtype).library
    return None if library is None else Kernels(library)
