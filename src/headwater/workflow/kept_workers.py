"""Workers between two runs of one Python program: to start one, and import torch, takes seconds."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from headwater.workflow.held_worker import QUIT_SECONDS, HeldWorker
from headwater.workflow.messages import WorkerSetup
from headwater.workflow.worker import IDLE_SECONDS

#: How many wait at once; each has the memory of an imported torch.
_MOST = 2
#: What a test runner changes for every test, and nothing we start reads.
_IGNORED = "PYTEST_CURRENT_TEST"


@dataclass(frozen=True)
class _Resting:
    """A worker that rests since `since`, started in these surroundings."""

    surroundings: Hashable
    worker: HeldWorker
    since: float

    def stays(self) -> bool:
        """Whether it is there, and will be for long enough to be told of a run."""
        return time.monotonic() - self.since < 0.9 * IDLE_SECONDS and not self.worker.gone


class KeptWorkers:
    """At most a few resting workers, each taken by a later run that would start one just like it.

    They end with the program, after a while without work (`worker.IDLE_SECONDS`), and are left
    alone by a forked child.
    """

    def __init__(self) -> None:
        self._resting: list[_Resting] = []
        self._lock = threading.Lock()
        self._owner: int | None = None

    def take(self, setup: WorkerSetup) -> HeldWorker | None:
        """A resting worker, told of its new run; None where there is none to be had."""
        wanted = _surroundings(setup)
        with self._lock:
            self._forget_strangers()
            fit = [one for one in self._resting if one.surroundings == wanted and one.stays()]
            if not fit:
                return None
            self._resting.remove(fit[0])
        fit[0].worker.begin(setup)
        return fit[0].worker

    def keep(self, worker: HeldWorker) -> bool:
        """Have a worker with nothing in hand rest here; False where it has to end instead."""
        found = _surroundings(worker.setup)
        if found is None or worker.setup.ranks > 1 or worker.stage is not None or not worker.rest():
            return False
        with self._lock:
            self._forget_strangers()
            self._resting.append(_Resting(found, worker, time.monotonic()))
            leaving, self._resting = self._resting[:-_MOST], self._resting[-_MOST:]
        _end(leaving)
        return True

    def close(self) -> None:
        """End them all."""
        with self._lock:
            self._forget_strangers()
            leaving, self._resting = self._resting, []
        _end(leaving)

    def _forget_strangers(self) -> None:
        """Those of the process that this one was forked from are not ours to talk to."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._resting = []
            atexit.register(self.close)


def _surroundings(setup: WorkerSetup) -> Hashable | None:
    """What a worker takes over from this process when it starts; None where that cannot be told."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return None
    variables = frozenset((k, v) for k, v in os.environ.items() if k != _IGNORED)
    return setup.threads, setup.deterministic, folder, tuple(sys.path), variables


def _end(leaving: list[_Resting]) -> None:
    for one in leaving:
        one.worker.quit()
    for one in leaving:
        one.worker.end(QUIT_SECONDS)
