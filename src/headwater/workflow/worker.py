"""A worker: a process of its own that runs one stage after another and then ends, or rests.

It ends at once when the run that started it is gone, however that happened, and holds a
shared lock on the run folder while it serves it, so that no other run begins before. Resting it
waits for another run of the same program.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import site
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
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
    Rest,
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
#: How long a worker rests before it ends.
IDLE_SECONDS = 300.0


def main(descriptor: int) -> None:
    """Serve the run at the other end of this socket, and those after it, until it says Quit, goes
    away, or has nothing to do for too long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    connection: Connection = Connection(descriptor)
    rests, served = True, False
    while rests and connection.poll(IDLE_SECONDS):
        try:
            setup: WorkerSetup | Quit = connection.recv()
        except (EOFError, OSError):  # the program ended while this rested
            return
        if isinstance(setup, Quit):
            return
        if served:
            log_of(setup).write_bytes(b"")
            _write_to(log_of(setup))
        with worker_lock(setup.run_dir).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            rests = _Worker(setup, connection).serve() and _is_as_new()
        served = True
        if rests:
            _write_to(Path(os.devnull))
            connection.send(Done())


def _write_to(log: Path) -> None:
    """From here on what this process says goes to the end of this file."""
    with log.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)


def _is_as_new() -> bool:
    """Whether the next run finds here what a new process would give it: no module that its owner
    may have edited in between, and no memory of a GPU that stays taken."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return False
    roots = {sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()}
    installed = (*(f"{root}{os.sep}" for root in roots), f"{Path(__file__).parents[1]}{os.sep}")
    files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
    return all(file.startswith(installed) for file in files if file.startswith(os.sep))


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
        self._rests = False

    def serve(self) -> bool:
        """Work until told to quit, or to rest; returns whether it was to rest."""
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
        return self._rests

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
            elif isinstance(message, Rest):
                self._rests = True
                self._tasks.put(None)
                return  # the next message is another run's
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


def log_of(setup: WorkerSetup) -> Path:
    """Where a worker of this run says what it says; the folder is made."""
    folder = setup.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    return folder / f"worker-{setup.number}.log"
