"""Worlds of several processes: a torch.distributed process group, and what ranks say through it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headwater.errors import HeadwaterError, RankLost, StageError
from headwater.world import MEETING, SOLO, World

T = TypeVar("T")

#: Ranks wait for each other while the main one grades, fetches a model, or saves. One that died is
#: seen by whoever started it, not by a clock.
_PATIENCE = timedelta(days=7)


class Ranks(World):
    """The processes of torch's default group. What they say to each other goes over gloo.

    Raises RankLost, on the ranks that are left, where one is gone.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._ends = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._meshes: dict[str, DeviceMesh] = {}

    def gather(self, value: T) -> list[T]:
        """Every rank's value in order of rank, on all of them."""
        found: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on the main rank, on all; an error it raises is raised by all."""
        told: list[Any] = [None]
        if self.is_main:
            told = [_outcome(compute)]
        with _peers():
            dist.broadcast_object_list(told, src=0, group=self._group)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def add(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum of all ranks' tensors, to the same bits on each."""
        with _peers():
            dist.all_reduce(tensor)

    def all_ended(self, within_seconds: float = 60.0) -> bool:
        """Whether every rank comes to the end of the stage too, within that time.

        Where not, some are in the middle of it, and nothing can be said to them any more.
        """
        try:
            dist.monitored_barrier(self._ends, timedelta(seconds=within_seconds))
        except RuntimeError:
            return False
        return True

    @staticmethod
    def loss_in(error: Exception) -> RankLost | None:
        """What an error of torch's collectives says of a rank that is gone; None of any other."""
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        )
        return _rank_lost(error) if lost else None

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks in one dimension, over whose devices of this kind weights are sharded."""
        if device.type not in self._meshes:
            self._meshes[device.type] = init_device_mesh(device.type, (self.size,))
        return self._meshes[device.type]


class _peers:
    """Turns what torch says of a rank that is gone into RankLost."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and issubclass(kind, RuntimeError):
            raise _rank_lost(error) from None


def _rank_lost(error: object) -> RankLost:
    said = str(error).partition("\n")[0]
    return RankLost(
        f"a rank of this stage is gone ({said}); expected all of them until its end: run "
        "again to continue from the last checkpoint"
    )


def _outcome(compute: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The value or the error, either of which can be sent."""
    try:
        return compute(), None
    except HeadwaterError as error:
        return None, error
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own, made a line ago
        except Exception:
            return None, StageError(f"{type(error).__name__}: {error}")
        return None, error


_joined: Ranks | None = None


def joined_world() -> World:
    """The world this process was started in, joined on the first call.

    torchrun, Ray Train and `workflow.launch` say by RANK and WORLD_SIZE (LOCAL_RANK picks the GPU)
    which ranks there are, and by MASTER_ADDR and MASTER_PORT, or a file, where they meet; a group
    that exists already is taken. Without these, the process is alone. What lies on GPUs goes over
    NCCL, whatever a stage computes on: ranks join before they are told of one.
    """
    global _joined
    if _joined is not None:
        return _joined
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return SOLO
        gpus = torch.cuda.device_count()
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if gpus:
            torch.cuda.set_device(own % gpus)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        meeting = os.environ.get(MEETING)
        dist.init_process_group(
            backend,
            init_method="env://" if meeting is None else f"file://{meeting}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=_PATIENCE,
        )
    _joined = Ranks()
    return _joined


def leave_world() -> None:
    """Take leave of the other ranks; they must do the same."""
    global _joined
    if _joined is not None:
        _joined = None
        dist.destroy_process_group()
