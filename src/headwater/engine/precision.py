"""Which device, which number format, how many threads."""

from __future__ import annotations

import os

import torch

from headwater.config.compute import Compute
from headwater.engine.cpu import cpuinfo, has_fast_bf16
from headwater.errors import InputError


def resolve_device(compute: Compute) -> torch.device:
    """`auto` is CUDA where there is a device. Raises InputError when CUDA is asked for in vain."""
    available = torch.cuda.is_available()
    if compute.device == "cuda" and not available:
        raise InputError(
            "compute.device=cuda, but torch sees no CUDA device; set compute.device=auto or cpu"
        )
    return torch.device("cuda" if available and compute.device != "cpu" else "cpu")


def check_devices(compute: Compute, ranks: int) -> None:
    """Raise InputError where this machine has not the GPUs that its `ranks` processes of a stage
    would take."""
    device, gpus = resolve_device(compute), torch.cuda.device_count()
    if device.type == "cpu" and compute.cpu_offload:
        raise InputError(
            "compute.cpu_offload=true, but torch sees no CUDA device; expected GPUs, whose memory "
            "it spares: remove cpu_offload, or use a machine that has some"
        )
    if device.type == "cuda" and ranks > gpus:
        raise InputError(
            f"compute.ranks={ranks} on a machine with {gpus} GPUs that torch sees; expected a GPU "
            f"for each rank: set compute.ranks <= {gpus}, or compute.device: cpu"
        )


def resolve_dtype(compute: Compute, device: torch.device, hidden_size: int) -> torch.dtype:
    """The compute format. `auto`: bfloat16 where the device multiplies it faster than float32;
    float32 for models so small (hidden size below 256) that rounding costs more than it saves."""
    if compute.precision == "float32":
        return torch.float32
    if compute.precision == "bfloat16":
        return torch.bfloat16
    if hidden_size < 256:
        return torch.float32
    fast = device.type == "cuda" or has_fast_bf16(cpuinfo())
    return torch.bfloat16 if fast else torch.float32


def settle_threads(threads: int | None) -> int:
    """torch's thread count, first fixed where a number is asked for."""
    return torch.get_num_threads() if threads is None else set_threads(threads)


def set_threads(threads: int | None) -> int:
    """Fix torch's thread count (None: one per core) and return it."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count
