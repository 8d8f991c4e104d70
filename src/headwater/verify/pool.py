"""Persistent worker processes that can be killed in the middle of a case, and replaced.

A case is a call `function(*arguments)` with text arguments. Cases run in parallel over the
workers; each has its own wall clock, enforced by killing the process. What a kill or a crash
costs is its own case alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from headwater.errors import InputError, StageError

_START_SECONDS = 60.0
_START_TRIES = 5
_TRIES = 3
_READ_BYTES = 1 << 16


class Ending(StrEnum):
    """How a case ended."""

    RETURNED = "returned"
    RAISED = "raised"
    OUT_OF_TIME = "out of time"
    OUT_OF_MEMORY = "out of memory"
    TOO_DEEP = "nested too deeply"
    TOO_LONG = "too long"
    CRASHED = "crashed its worker"


@dataclass(frozen=True, slots=True)
class CaseOutcome:
    """What became of one case; `value` where it returned, `detail` names an exception type."""

    ending: Ending
    seconds: float
    value: bool | int | float | str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one case may use.

    `sealed` refuses every write, process and socket; files cannot grow in any worker.
    """

    timeout_seconds: float = 5.0
    memory_bytes: int = 2 << 30
    argument_characters: int = 1 << 20
    sealed: bool = True


@dataclass(slots=True)
class _Case:
    index: int
    request: bytes = field(repr=False)
    tries: int = 0
    seconds: float = 0.0


class WorkerPool:
    """`workers` processes that each call `target` ("module:function"); they start on first use."""

    def __init__(
        self,
        target: str,
        workers: int = 1,
        limits: WorkerLimits | None = None,
        name: str | None = None,
    ) -> None:
        """Prepare the pool; raise InputError for fewer than one worker. `name`: for messages."""
        if workers < 1:
            raise InputError(f"workers={workers} cannot grade anything; set workers >= 1")
        self._target = target
        self._name = name or target
        self._count = workers
        self._limits = limits or WorkerLimits()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def run(self, calls: Sequence[tuple[str, ...]]) -> list[CaseOutcome]:
        """Return the outcome of `target(*arguments)` for each call, in order."""
        outcomes: list[CaseOutcome | None] = [None] * len(calls)
        waiting: deque[_Case] = deque()
        for index, arguments in enumerate(calls):
            if sum(map(len, arguments)) > self._limits.argument_characters:
                outcomes[index] = CaseOutcome(Ending.TOO_LONG, 0.0)
            else:
                waiting.append(_Case(index, json.dumps(arguments).encode() + b"\n"))
        with self._lock:
            try:
                self._work_off(waiting, outcomes)
            except BaseException:
                _kill_all(self._workers)
                raise
        return [outcome for outcome in outcomes if outcome is not None]

    def start(self) -> None:
        """Start one worker now, so that a target that cannot be loaded is found before work is.

        Raises InputError naming the target and what importing it said.
        """
        with self._lock:
            if not self._workers:
                self._workers.append(_Worker(self._target, self._limits))
            while not self._workers[0].ready:
                self._wait(starting_matters=True)
                self._check_start(0, self._workers[0].read())

    def close(self) -> None:
        """End every worker; the pool can be used again and would start new ones."""
        with self._lock:
            _kill_all(self._workers)

    def __repr__(self) -> str:
        return f"WorkerPool({self._target!r}, workers={self._count})"

    def _work_off(self, waiting: deque[_Case], outcomes: list[CaseOutcome | None]) -> None:
        while len(self._workers) < min(self._count, len(waiting)):
            self._workers.append(_Worker(self._target, self._limits))
        while waiting or any(worker.case for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and worker.case is None:
                    worker.send(waiting.popleft())
            self._wait(bool(waiting))
            for place, worker in enumerate(self._workers):
                self._attend(place, worker, waiting, outcomes)

    def _wait(self, starting_matters: bool) -> None:
        """Sleep until a worker has something to say, can take more, or has run out of time."""
        deadline = time.monotonic() + _START_SECONDS
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.case is None and (worker.ready or not starting_matters):
                    continue
                selector.register(worker.replies, selectors.EVENT_READ)
                if worker.unsent:
                    selector.register(worker.requests, selectors.EVENT_WRITE)
                deadline = min(deadline, worker.deadline)
            selector.select(max(0.0, deadline - time.monotonic()))

    def _attend(
        self,
        place: int,
        worker: _Worker,
        waiting: deque[_Case],
        outcomes: list[CaseOutcome | None],
    ) -> None:
        """Take what a worker says; replace it where it died or ran out of time."""
        worker.push()
        reply = worker.read()
        if not worker.ready:
            self._check_start(place, reply)
            return
        if worker.case is None:
            if worker.dead:
                self._replace(place)
            return
        case = worker.case
        if reply is not None:
            case.seconds += time.monotonic() - worker.since
            outcomes[case.index] = _outcome(reply, case.seconds)
            worker.case = None
        elif worker.dead or time.monotonic() >= worker.deadline:
            out_of_time = not worker.dead or worker.ran_out_of_cpu()
            case.seconds += time.monotonic() - worker.since
            if out_of_time:
                outcomes[case.index] = CaseOutcome(Ending.OUT_OF_TIME, case.seconds)
            elif case.tries >= _TRIES:
                outcomes[case.index] = CaseOutcome(Ending.CRASHED, case.seconds)
            else:
                waiting.appendleft(case)
            self._replace(place)

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place] = _Worker(self._target, self._limits)

    def _check_start(self, place: int, reply: dict[str, Any] | None) -> None:
        worker = self._workers[place]
        if reply is not None and "load_error" in reply:
            raise InputError(
                f"verifier {self._name} cannot be loaded ({reply['load_error']}); give "
                "module:function or file.py:function that imports in this environment"
            )
        if reply is not None:
            worker.ready = True
            self._failed_starts = 0
        elif worker.dead or time.monotonic() >= worker.deadline:
            self._failed_starts += 1
            if self._failed_starts < _START_TRIES:
                self._replace(place)
                return
            raise StageError(
                f"a worker for {self._target} ended or hung while starting, "
                f"{_START_TRIES} times in a row "
                f"(limits: {_START_SECONDS:g} s, {self._limits.memory_bytes} bytes); "
                "import its module by hand to see why, or allow more memory"
            )


class _Worker:
    """One process, the case it has in hand, and the bytes on their way to and from it."""

    def __init__(self, target: str, limits: WorkerLimits) -> None:
        settings = {
            "target": target,
            "memory_bytes": limits.memory_bytes,
            "timeout_seconds": limits.timeout_seconds,
            "sealed": limits.sealed,
        }
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headwater.verify.worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.requests = self._process.stdin.fileno()
        self.replies = self._process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.ready = False
        self.dead = False
        self.case: _Case | None = None
        self.unsent = b""
        self.since = time.monotonic()
        self.deadline = self.since + _START_SECONDS
        self._timeout_seconds = limits.timeout_seconds
        self._heard = bytearray()

    def send(self, case: _Case) -> None:
        """Take a case in hand; its clock starts now."""
        case.tries += 1
        self.case = case
        self.unsent = case.request
        self.since = time.monotonic()
        self.deadline = self.since + self._timeout_seconds
        self.push()

    def push(self) -> None:
        """Write as much of the request as the pipe takes."""
        while self.unsent and not self.dead:
            try:
                written = os.write(self.requests, self.unsent)
            except BlockingIOError:
                return
            except OSError:
                self.dead = True
                return
            self.unsent = self.unsent[written:]

    def read(self) -> dict[str, Any] | None:
        """Return the next reply, if a whole one has come."""
        while b"\n" not in self._heard:
            try:
                piece = os.read(self.replies, _READ_BYTES)
            except BlockingIOError:
                return None
            if not piece:
                self.dead = True
                return None
            self._heard += piece
        line, _, rest = bytes(self._heard).partition(b"\n")
        self._heard = bytearray(rest)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ran_out_of_cpu(self) -> bool:
        """Whether the kernel ended the process for its CPU limit."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=1.0) == -int(signal.SIGXCPU)
        return False

    def kill(self) -> None:
        """End the process at once and collect it."""
        self.dead = True
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


def _outcome(reply: dict[str, Any], seconds: float) -> CaseOutcome:
    if "limit" in reply:
        limit = Ending.OUT_OF_MEMORY if reply["limit"] == "memory" else Ending.TOO_DEEP
        return CaseOutcome(limit, seconds)
    if "error" in reply:
        return CaseOutcome(Ending.RAISED, seconds, detail=reply["error"])
    return CaseOutcome(Ending.RETURNED, seconds, value=reply["value"], detail=reply.get("type", ""))


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
