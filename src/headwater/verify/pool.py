"""Persistent worker processes that can be killed in the middle of a case, and replaced.

A case is a call `function(*arguments)` with text arguments. Cases run in parallel over the
workers; each has its own wall clock, enforced by killing the process. A kill costs its own case
alone, and its replacement is forked from a process that has imported the function already. A
case whose worker was killed by somebody else, or crashed, is tried again.
"""

from __future__ import annotations

import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from headwater.errors import InputError, StageError
from headwater.verify.processes import (
    Attempts,
    Case,
    End,
    ForkServer,
    Worker,
    WorkerLimits,
)

__all__ = ["CaseOutcome", "Ending", "WorkerLimits", "WorkerPool"]
_LONGEST_WAIT_SECONDS = 60.0


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
        self._servers: list[ForkServer] = []
        self._workers: list[Worker] = []
        self._starts = Attempts()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._servers, self._workers)

    def run(self, calls: Sequence[tuple[str, ...]]) -> list[CaseOutcome]:
        """Return the outcome of `target(*arguments)` for each call, in order."""
        outcomes: list[CaseOutcome | None] = [None] * len(calls)
        waiting: deque[Case] = deque()
        for index, arguments in enumerate(calls):
            if sum(map(len, arguments)) > self._limits.argument_characters:
                outcomes[index] = CaseOutcome(Ending.TOO_LONG, 0.0)
            else:
                waiting.append(Case(index, arguments))
        with self._lock:
            try:
                self._work_off(waiting, outcomes)
            except BaseException:
                _end_all(self._servers, self._workers)
                raise
        return [outcome for outcome in outcomes if outcome is not None]

    def start(self) -> None:
        """Start one worker now, so that a target that cannot be loaded is found before work is.

        Raises InputError naming the target and what importing it said.
        """
        with self._lock:
            try:
                if not self._workers:
                    self._workers.append(self._new_worker())
                while not self._workers[0].ready:
                    self._wait(starting_matters=True)
                    self._check_start(0, self._workers[0].read())
            except BaseException:
                _end_all(self._servers, self._workers)
                raise

    def close(self) -> None:
        """End every worker; the pool can be used again and would start new ones."""
        with self._lock:
            _end_all(self._servers, self._workers)

    def __repr__(self) -> str:
        return f"WorkerPool({self._target!r}, workers={self._count})"

    def _work_off(self, waiting: deque[Case], outcomes: list[CaseOutcome | None]) -> None:
        if self._servers and not self._servers[0].usable:
            _end_all(self._servers, self._workers)
        while len(self._workers) < min(self._count, len(waiting)):
            self._workers.append(self._new_worker())
        while waiting or any(worker.case for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and worker.case is None:
                    worker.send(waiting.popleft())
            self._wait(bool(waiting))
            for place, worker in enumerate(self._workers):
                self._attend(place, worker, waiting, outcomes)

    def _wait(self, starting_matters: bool) -> None:
        """Sleep until a worker has something to say, can take more, or has run out of time."""
        deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.case is None and (worker.ready or not starting_matters):
                    continue
                sends = selectors.EVENT_WRITE if worker.unsent else 0
                selector.register(worker.connection, selectors.EVENT_READ | sends)
                deadline = min(deadline, worker.deadline)
            selector.select(max(0.0, deadline - time.monotonic()))

    def _attend(
        self,
        place: int,
        worker: Worker,
        waiting: deque[Case],
        outcomes: list[CaseOutcome | None],
    ) -> None:
        """Take what a worker says; replace it where it died or ran out of time."""
        worker.push()
        reply = worker.read()
        if not worker.ready:
            self._check_start(place, reply)
            return
        case = worker.case
        late = case is not None and time.monotonic() >= worker.deadline
        if case is not None and (reply or worker.dead or late):
            case.seconds += time.monotonic() - worker.since
            worker.case = None
            outcome = _outcome(reply, case.seconds) if reply else _unfinished(worker, case)
            short_of_memory = outcome is not None and outcome.ending is Ending.OUT_OF_MEMORY
            if short_of_memory and worker.sent > 1:
                outcome = None
            if outcome is None:
                waiting.appendleft(case)
            outcomes[case.index] = outcome
            if short_of_memory or reply is None:
                self._replace(place)
        elif worker.dead:
            self._replace(place)

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place] = self._new_worker()

    def _new_worker(self) -> Worker:
        if self._servers and not self._servers[0].usable:
            self._servers.pop().close()
        if not self._servers:
            self._servers.append(ForkServer(self._target, self._limits))
        return self._servers[0].fork()

    def _check_start(self, place: int, reply: dict[str, Any] | None) -> None:
        worker = self._workers[place]
        if reply is not None and "load_error" in reply:
            raise InputError(
                f"verifier {self._name} cannot be loaded ({reply['load_error']}); give "
                "module:function or file.py:function that imports in this environment"
            )
        if reply is not None:
            worker.ready = True
            worker.server.note_ready()
            self._starts = Attempts()
        elif worker.dead or time.monotonic() >= worker.deadline:
            self._start_again(place)

    def _start_again(self, place: int) -> None:
        """Replace a worker that ended or hung while starting, and the server it hung in."""
        worker = self._workers[place]
        if self._servers and worker.server is self._servers[0]:
            self._starts.add(worker.dead and worker.end() is End.OTHERS)
            if not worker.dead:
                self._servers.pop().close(at_once=True)
        if self._starts.exhausted:
            raise StageError(
                f"workers for {self._target} end or hang while starting "
                f"({self._starts.crashes} times by themselves, {self._starts.kills} times killed; "
                f"limit: {self._limits.memory_bytes} bytes of memory); "
                "import its module by hand to see why, or allow more memory"
            )
        self._replace(place)


def _outcome(reply: dict[str, Any], seconds: float) -> CaseOutcome:
    if "limit" in reply:
        limit = Ending.OUT_OF_MEMORY if reply["limit"] == "memory" else Ending.TOO_DEEP
        return CaseOutcome(limit, seconds)
    if "error" in reply:
        return CaseOutcome(Ending.RAISED, seconds, detail=str(reply["error"]))
    value, detail = reply.get("value"), str(reply.get("type", ""))
    return CaseOutcome(Ending.RETURNED, seconds, value=value, detail=detail)


def _unfinished(worker: Worker, case: Case) -> CaseOutcome | None:
    """What becomes of a case whose worker said nothing; None: it is tried again."""
    if not worker.dead:
        return CaseOutcome(Ending.OUT_OF_TIME, case.seconds)
    end = worker.end()
    if end is End.PROCESSOR_TIME:
        return CaseOutcome(Ending.OUT_OF_TIME, case.seconds)
    case.attempts.add(end is End.OTHERS)
    return CaseOutcome(Ending.CRASHED, case.seconds) if case.attempts.exhausted else None


def _end_all(servers: list[ForkServer], workers: list[Worker]) -> None:
    while workers:
        workers.pop().kill()
    while servers:
        servers.pop().close()
