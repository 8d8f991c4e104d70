"""Pools of misbehaving functions, and their processes as the kernel lists them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater.verify.pool import WorkerLimits, WorkerPool

TARGET = "grading_targets:act"


@contextmanager
def misbehaving_pool(
    workers: int = 1, seconds: float = 5.0, memory_bytes: int = 2 << 30
) -> Iterator[WorkerPool]:
    """Unsealed workers of `grading_targets.act`; they end with the context."""
    settings = WorkerLimits(timeout_seconds=seconds, memory_bytes=memory_bytes, sealed=False)
    pool = WorkerPool(TARGET, workers, settings)
    try:
        yield pool
    finally:
        pool.close()


def started_since(before: list[int]) -> list[int]:
    """Processes that this one has started since."""
    return [pid for pid in children(os.getpid()) if pid not in before]


def children(pid: int) -> list[int]:
    """Ids of the running children of a process, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            state, parent = _state(int(folder.name))
            if parent == pid and state not in ("Z", "X", ""):
                found.append(int(folder.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Ids of running children, their children and so on."""
    found = children(pid)
    return found + [deeper for child in found for deeper in descendants(child)]


def all_end(pids: list[int], within_seconds: float = 5.0) -> bool:
    """Whether all of these processes end in time."""
    return _comes_true(lambda: not any(_runs(pid) for pid in pids), within_seconds)


def runs_with(argument: str) -> bool:
    """Whether any process has this word on its command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _runs(int(folder.name)):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argument.encode() in words:
                return True
    return False


def _runs(pid: int) -> bool:
    return _state(pid)[0] not in ("Z", "X", "")


def _state(pid: int) -> tuple[str, int]:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return after_name[0], int(after_name[1])


def _comes_true(holds: Callable[[], bool], within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
