"""Which device, which number format, how many threads."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from headwater.config.recipe import Compute
from headwater.errors import InputError


def resolve_device(compute: Compute) -> torch.device:
    """`auto` is CUDA where there is a device. Raises InputError when CUDA is asked for in vain."""
    available = torch.cuda.is_available()
    if compute.device == "cuda" and not available:
        raise InputError(
            "compute.device=cuda, but torch sees no CUDA device; set compute.device=auto or cpu"
        )
    return torch.device("cuda" if available and compute.device != "cpu" else "cpu")


def cpu_has_bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    text = info.read_text(encoding="utf-8", errors="replace")
    return "avx512_bf16" in text or "amx_bf16" in text


def resolve_dtype(compute: Compute, device: torch.device, hidden_size: int) -> torch.dtype:
    """The compute format. `auto`: bfloat16 where the device multiplies it in hardware, float32
    for models so small (hidden size below 256) that rounding costs more than it saves."""
    if compute.precision == "float32":
        return torch.float32
    if compute.precision == "bfloat16":
        return torch.bfloat16
    if hidden_size < 256:
        return torch.float32
    fast = device.type == "cuda" or cpu_has_bf16_products()
    return torch.bfloat16 if fast else torch.float32


def set_threads(threads: int | None) -> int:
    """Fix torch's thread count (None: one per core) and return it."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count
