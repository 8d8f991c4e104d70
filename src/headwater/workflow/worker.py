"""A worker: a process of its own that runs one stage after another and then ends.

It ends at once when the run that started it is gone, however that happened, and holds a
shared lock on the run folder while it lives, so that no other run begins before.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from headwater.errors import StageError
from headwater.ledger import Ledger
from headwater.stages.job import StageContext
from headwater.types import Problem
from headwater.verify.grading import Verifier
from headwater.verify.vault import LabelVault
from headwater.workflow.messages import (
    Call,
    Done,
    Failed,
    FromWorker,
    ProblemSet,
    Progress,
    Quit,
    StageTask,
    Stop,
    Warned,
    WorkerSetup,
)
from headwater.workflow.rank import Order, OutOfStep, dismiss, run_on_ranks
from headwater.workflow.stage_run import (
    Keeper,
    LocalKeeper,
    load_function,
    reply_of,
    return_memory,
    run_begun,
    verifier_of,
)
from headwater.workflow.store import ArtifactStore, worker_lock

if TYPE_CHECKING:
    from headwater.engine.ranks import Ranks
    from headwater.stages.job import StageJob

_PROGRESS_SECONDS = 0.2


def main(descriptor: int) -> None:
    """Serve the run at the other end of this socket until it says Quit or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    connection: Connection = Connection(descriptor)
    setup: WorkerSetup = connection.recv()
    with worker_lock(setup.run_dir).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _Worker(setup, connection).serve()


class _Worker:
    def __init__(self, setup: WorkerSetup, connection: Connection) -> None:
        self._setup = setup
        self._connection = connection
        self._stop = threading.Event()
        self._tasks: queue.Queue[StageTask | Call | None] = queue.Queue()
        self._problem_sets: dict[str, tuple[Problem, ...]] = {}
        self._verifier: Verifier | None = None
        self._last_progress = 0.0
        self._world: Ranks | None = None
        self._out_of_step = False

    def serve(self) -> None:
        """Work until told to quit."""
        threading.Thread(target=self._read, daemon=True, name="inbox").start()
        setup = self._setup
        store = ArtifactStore(setup.run_dir)
        ledger = Ledger(setup.run_dir / "ledger.sqlite", setup.limits, setup.stages)
        keeper = LocalKeeper(store, ledger)
        with ExitStack() as closing:
            closing.callback(self._close_verifier)
            closing.callback(ledger.close)
            closing.callback(self._dismiss)
            while (task := self._tasks.get()) is not None:
                doing = task.target if isinstance(task, Call) else task.description
                reply = reply_of(partial(self._do, task, keeper), doing, setup.run_dir)
                if isinstance(reply, Failed) and self._out_of_step:
                    reply = replace(reply, leaves=True)
                self._send(reply)
                if self._out_of_step:
                    os._exit(1)
                del task
                return_memory()

    def _read(self) -> None:
        """Inbox: stops are heard while a stage runs; a closed socket means the run is gone."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(message, Stop):
                self._stop.set()
            elif isinstance(message, ProblemSet):
                self._problem_sets[message.name] = message.problems
            elif isinstance(message, Quit):
                self._tasks.put(None)
            else:
                self._stop.clear()
                self._tasks.put(message)

    def _do(self, task: StageTask | Call, keeper: Keeper) -> Done:
        """Call a function, or run and publish one stage."""
        if isinstance(task, Call):
            return Done(value=load_function(task.target)(*task.arguments))
        if task.problem_set is not None:
            problems = self._problem_sets[task.problem_set]
            task = replace(task, job=replace(task.job, problems=problems))
        begun = keeper.begin(task)
        vault = None
        if begun.labels is not None:
            vault = LabelVault(begun.labels, self._verifier_of_run())
        context = StageContext(
            begun.account,
            vault,
            self._report_progress,
            self._stop.is_set,
            lambda alert: self._send(Warned(alert.words)),
            self._setup.strict,
        )
        seconds = self._compute(begun.job, context)
        keeper.publish(task, seconds)
        return Done(seconds)

    def _compute(self, job: StageJob, context: StageContext) -> float:
        """The stage itself, alone or with the other ranks; only this one fetches models."""
        setup = self._setup
        if setup.ranks == 1 or job.kind == "source":
            return run_begun(job, context, setup)
        world = self._joined()
        started = time.perf_counter()
        order = Order(setup.run_stage, job, context.vault is not None, setup.strict)
        try:
            run_on_ranks(world, order, context)
        except OutOfStep as lost:
            self._out_of_step = True
            raise (lost.__cause__ or StageError(str(lost))) from None
        return time.perf_counter() - started

    def _verifier_of_run(self) -> Verifier:
        if self._verifier is None:
            self._verifier = verifier_of(self._setup)
        return self._verifier

    def _joined(self) -> Ranks:
        """The world of this process and the other ranks."""
        if self._world is None:
            self._world = load_function("headwater.engine.ranks:joined_world")()
        return self._world

    def _dismiss(self) -> None:
        """Let the other ranks go: they wait to meet this one even where no stage was theirs."""
        if self._setup.ranks > 1:
            dismiss(self._joined())

    def _close_verifier(self) -> None:
        if self._verifier is not None:
            self._verifier.close()

    def _report_progress(self, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self._setup.every_step or now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            self._send(Progress(dict(values)))

    def _send(self, message: FromWorker) -> None:
        try:
            self._connection.send(message)
        except OSError:  # the run is gone; so are we
            os._exit(1)


def socket_pair() -> tuple[Connection, socket.socket]:
    """The run's end as a connection, and the worker's end to be handed over."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs
