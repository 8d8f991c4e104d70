"""The world of several processes that run one stage together, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from headwater.world import SOLO, World

T = TypeVar("T")


class Ranks(World):
    """The processes of the default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """Every rank's value in order of rank, on all of them."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on the main rank, on all; an error it raises is raised by all."""
        told: list[Any] = [None]
        if self.is_main:
            try:
                told = [(True, compute())]
            except Exception as error:  # everybody's
                told = [(False, error)]
        dist.broadcast_object_list(told, src=0)
        well, value = told[0]
        if not well:
            raise value
        return value


def joined_world() -> World:
    """The world of the default process group, which is initialised where there is none yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Ranks() if dist.get_world_size() > 1 else SOLO
