"""What an all-gather costs between processes of this machine: over NCCL on GPUs, else over gloo."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

_LARGE_BYTES, _SMALL_BYTES = 64 * 2**20, 4096
_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Collectives:
    """bandwidth: bytes a second that one rank receives of the others; latency: seconds of a
    gathering of next to nothing."""

    ranks: int
    backend: str
    bandwidth: float
    latency: float


def measure_collectives(ranks: int, folder: Path) -> Collectives:
    """Start `ranks` processes of one thread each, let them gather, and read what rank 0 found.

    One GPU each where there are as many.
    """
    backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"
    found = folder / "collectives.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (ranks, backend, port, str(found)), nprocs=ranks, join=True)
    large, small = map(float, found.read_text(encoding="ascii").split())
    received = _LARGE_BYTES * (ranks - 1) / ranks
    return Collectives(ranks, backend, received / max(large - small, 1e-9), small)


def _rank(rank: int, ranks: int, backend: str, port: int, found: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    try:
        seconds = [_gathering(size, ranks, device) for size in (_LARGE_BYTES, _SMALL_BYTES)]
        if rank == 0:
            Path(found).write_text(" ".join(map(str, seconds)), encoding="ascii")
    finally:
        dist.destroy_process_group()


def _gathering(size: int, ranks: int, device: torch.device) -> float:
    """Seconds of one, the median of several after a first."""
    mine = torch.ones(size // 4 // ranks, device=device)
    whole = torch.empty(mine.numel() * ranks, device=device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    seconds = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        gather(whole, mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[_REPEATS // 2]
