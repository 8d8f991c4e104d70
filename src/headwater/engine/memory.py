"""Memory of one stage: its peak, in bytes (the process's on a CPU, the device's on a GPU), and
what an allocation that failed looks like.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
#: What torch says where it has no class for it.
_FAILED_ALLOCATIONS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what large tensors free, instead of returning it page by page.

    A training step otherwise maps, faults in and unmaps gigabytes: about a million page faults
    a step at 135M parameters. Does nothing where the C library has no `mallopt`.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


class OutOfMemory(Exception):
    """Something did not fit and was undone: it may be tried again in smaller pieces."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(sign in said for sign in _FAILED_ALLOCATIONS)


def release_memory() -> None:
    """Let go of what a failed attempt held; call it once its error is out of scope."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start measuring afresh where the system allows it (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Largest use since `reset_peak_memory`; since the process began where it cannot be reset."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
