"""A worker: a process of its own that runs one stage after another and then ends.

It ends at once when the run that started it is gone, however that happened, and holds a
shared lock on the run folder while it lives, so that no other run begins before.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from headwater.errors import HeadwaterError, StageError
from headwater.ledger import Ledger
from headwater.ledger.ledger import Kind
from headwater.redaction import redact
from headwater.stages.job import StageContext, StageJob
from headwater.storage import disk_error
from headwater.types import Problem
from headwater.verify.grading import Verifier
from headwater.verify.vault import LabelVault
from headwater.verify.verifiers import make_verifier
from headwater.workflow.accounts import write_statement
from headwater.workflow.graph import EVALUATES
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
from headwater.workflow.rank import Order, RanksLost, dismiss, run_on_ranks
from headwater.workflow.store import ArtifactStore, worker_lock

if TYPE_CHECKING:
    from headwater.engine.ranks import Ranks

RunStage = Callable[[StageJob, StageContext], None]

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

    def serve(self) -> None:
        """Work until told to quit."""
        threading.Thread(target=self._read, daemon=True, name="inbox").start()
        store = ArtifactStore(self._setup.run_dir)
        setup = self._setup
        ledger = Ledger(setup.run_dir / "ledger.sqlite", setup.limits, setup.stages)
        with ExitStack() as closing:
            closing.callback(self._close_verifier)
            closing.callback(ledger.close)
            closing.callback(self._dismiss)
            while (task := self._tasks.get()) is not None:
                doing = task.target if isinstance(task, Call) else task.description
                try:
                    if isinstance(task, Call):
                        reply = Done(value=load_function(task.target)(*task.arguments))
                    else:
                        reply = Done(self._run_stage(task, store, ledger))
                except HeadwaterError as error:
                    self._send(Failed.of(error, doing))
                except RanksLost as lost:
                    self._send(Failed.of(lost.__cause__ or StageError(f"{doing}: {lost}"), doing))
                    os._exit(1)
                except Exception as error:  # the process boundary: told to the run as it is
                    with suppress(OSError):  # the log may lie on the disk that is full
                        print(redact(traceback.format_exc()), file=sys.stderr)
                    told = disk_error(error, setup.run_dir)
                    failure = error if told is None else StageError(f"{doing}: {told}")
                    self._send(Failed.of(failure, doing))
                else:
                    self._send(reply)
                del task
                _return_memory()

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

    def _run_stage(self, task: StageTask, store: ArtifactStore, ledger: Ledger) -> float:
        """Run and publish one stage; returns its seconds in this process."""
        started = time.perf_counter()
        job = task.job
        if task.problem_set is not None:
            job = replace(job, problems=self._problem_sets[task.problem_set])
        for parent in task.facts["parents"]:
            if store.get(parent) is None:
                raise StageError(
                    f"{store.path(parent)}: what {task.description} reads is gone; leave the run "
                    "folder alone while it is used, and run again to rebuild it"
                )
        kind: Kind = "eval" if job.kind in EVALUATES else "train"
        account = ledger.account(job.fingerprint, kind)
        if not store.begin(job.fingerprint):
            account.rewind(0)
        vault = None
        if task.labels is not None:
            vault = LabelVault(task.labels, self._verifier_of_run())
        context = StageContext(
            account,
            vault,
            self._report_progress,
            self._stop.is_set,
            lambda alert: self._send(Warned(alert.words)),
            self._setup.strict,
        )
        self._compute(job, context)
        seconds = time.perf_counter() - started
        write_statement(ledger, job.fingerprint, kind, job.output_dir)
        store.publish(job.fingerprint, {**task.facts, "seconds": round(seconds, 3)})
        return seconds

    def _compute(self, job: StageJob, context: StageContext) -> None:
        """The stage itself, alone or with the other ranks; only this one fetches models."""
        if self._setup.ranks == 1 or job.kind == "source":
            run_stage: RunStage = load_function(self._setup.run_stage)
            run_stage(job, context)
            return
        if self._world is None:
            self._world = load_function("headwater.engine.ranks:joined_world")(job.compute.device)
        order = Order(self._setup.run_stage, job, context.vault is not None, self._setup.strict)
        run_on_ranks(self._world, order, context)

    def _verifier_of_run(self) -> Verifier:
        if self._verifier is None:
            self._verifier = make_verifier(
                self._setup.verifier,
                workers=self._setup.verifier_workers,
                timeout_seconds=self._setup.verifier_timeout_seconds,
                correct_from=self._setup.verifier_correct_from,
            )
        return self._verifier

    def _dismiss(self) -> None:
        if self._world is not None:
            dismiss(self._world)

    def _close_verifier(self) -> None:
        if self._verifier is not None:
            self._verifier.close()

    def _report_progress(self, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            self._send(Progress(dict(values)))

    def _send(self, message: FromWorker) -> None:
        try:
            self._connection.send(message)
        except OSError:  # the run is gone; so are we
            os._exit(1)


def load_function(target: str) -> Callable[..., Any]:
    """The function "module:name" names. Raises ImportError or AttributeError."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _return_memory() -> None:
    """Give freed memory back to the system, so that idle workers do not hold models' pages."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from musl
        if trim is not None:
            trim(0)


def socket_pair() -> tuple[Connection, socket.socket]:
    """The run's end as a connection, and the worker's end to be handed over."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs
