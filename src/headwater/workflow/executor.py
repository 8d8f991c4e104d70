"""Runs a graph's stages in worker processes, several independent ones at once.

What a stage computes depends on its job alone, so neither the number of workers nor the
order in which stages happen to run shows in any result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from headwater.errors import BudgetExhausted, RankLost, StageError
from headwater.workflow.agenda import Agenda, Concerns
from headwater.workflow.graph import Graph
from headwater.workflow.held_worker import QUIT_SECONDS, HeldWorker
from headwater.workflow.interrupts import Interrupts
from headwater.workflow.kept_workers import KeptWorkers
from headwater.workflow.launch import Launch, launch_worker, launched_rank
from headwater.workflow.messages import (
    Call,
    Done,
    Progress,
    StageTask,
    Stop,
    Warned,
    WorkerSetup,
)
from headwater.workflow.progress import ProgressView

#: Under torchrun a worker lets the other ranks go, who would else wait for ever: also one that has
#: only just been started for that, on a machine that is busy with other things.
_PARTING_SECONDS = 600.0
_LISTEN_SECONDS = 0.2
#: Workers of this program that wait for its next run.
KEPT = KeptWorkers()


class Executor:
    """Workers for one run, started when first needed; a context that ends them.

    In a main thread the context also takes over Ctrl-C: the first asks every stage to save
    itself and stop, the second ends the workers at once.

    task_of: the task of a fingerprint, called when its parents are published. launch: how a
    worker's process is started.
    """

    def __init__(
        self,
        graph: Graph,
        setup: WorkerSetup,
        processes: int,
        task_of: Callable[[str], StageTask],
        view: ProgressView,
        launch: Launch = launch_worker,
    ) -> None:
        self._graph = graph
        self._setup = setup
        self._processes = processes
        self._task_of = task_of
        self.view = view
        self._launch = launch
        self._workers: list[HeldWorker] = []
        self._agenda = Agenda(graph)
        self._interrupts = Interrupts()
        self._losses: Counter[str] = Counter()

    def run(self, wanted: Iterable[str], published: Iterable[str]) -> BudgetExhausted | None:
        """Run the `wanted` stages that are not yet `published`; parents must be in one of both.

        Returns the error of a budget that ended the run early: what was finished by then is
        evaluated all the same. Raises Interrupted once every stage in hand is saved, and
        StageError for a stage that failed or a worker that died.
        """
        self._agenda.queue(wanted, published)
        while True:
            self._pass_on_interrupts()
            self._assign()
            if not any(worker.stage for worker in self._workers):
                return self._agenda.outcome()
            self._listen()

    def call(self, target: str, *arguments: Any) -> Any:
        """Call "module:function" in an idle worker and return what it returns, or raise."""
        worker = self._idle_worker()
        worker.tell(Call(target, arguments))
        try:
            reply = worker.connection.recv()
        except (EOFError, OSError):
            raise StageError(worker.obituary(target)) from None
        if isinstance(reply, Done):
            return reply.value
        raise reply.error()

    def __enter__(self) -> Self:
        """From here on SIGINT and SIGTERM are counted and obeyed by `run`, not died of."""
        self._interrupts.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None and launched_rank() is not None:
            self._idle_worker()  # where nothing was left to do: lets the other ranks go
        leaving = self._workers if exc else [w for w in self._workers if not self._keep(w)]
        for worker in leaving:
            worker.quit()
        patience = QUIT_SECONDS if launched_rank() is None else _PARTING_SECONDS
        for worker in leaving:
            worker.end(patience if exc is None else 0.0)
        self._workers.clear()
        self._interrupts.__exit__(exc_type, exc, traceback)

    def _assign(self) -> None:
        """Give ready stages to idle workers, the most urgent first."""
        while sum(worker.stage is not None for worker in self._workers) < self._processes:
            fingerprint = self._agenda.next()
            if fingerprint is None:
                return
            worker = self._idle_worker()
            worker.stage = fingerprint
            self.view.started(fingerprint)
            worker.give(self._task_of(fingerprint))

    def _idle_worker(self) -> HeldWorker:
        for worker in [worker for worker in self._workers if worker.stage is None]:
            if not worker.gone:
                return worker
            self._bury(worker)
        taken = {worker.number for worker in self._workers}
        number = next(n for n in count() if n not in taken)
        setup = replace(self._setup, number=number)
        kept = KEPT.take(setup) if self._launch is launch_worker else None
        worker = kept or HeldWorker(setup, self._launch)
        self._workers.append(worker)
        return worker

    def _keep(self, worker: HeldWorker) -> bool:
        """Keep a worker for this program's next run, if it can serve one."""
        return self._launch is launch_worker and KEPT.keep(worker)

    def _listen(self) -> None:
        """Take whatever the workers say within a moment."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=_LISTEN_SECONDS):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            stage = worker.stage
            assert stage is not None, "idle workers say nothing"
            if isinstance(message, Progress):
                self.view.progressed(stage, message.values)
                continue
            if isinstance(message, Warned):
                self.view.warned(stage, message.words)
                continue
            worker.stage = None
            if isinstance(message, Done):
                self._agenda.finish(stage)
                self.view.finished(stage, message.seconds)
                continue
            if message.leaves:
                self._workers.remove(worker)
                worker.end(QUIT_SECONDS)
            if isinstance(error := message.error(), RankLost):
                self._lose(stage, str(error))
            else:
                self.view.stopped(stage, str(error))
                self._stop_workers(self._agenda.take_error(error))

    def _bury(self, worker: HeldWorker) -> None:
        """A worker is gone, and will be replaced; the stage it had in hand is lost with it."""
        self._workers.remove(worker)
        if worker.stage is not None:
            self._lose(worker.stage, worker.obituary(self._graph.describe(worker.stage)))
        worker.end(0.0)

    def _lose(self, stage: str, message: str) -> None:
        """Start a stage again whose process was lost, as often as is allowed; then fail."""
        self.view.stopped(stage, message)
        self._losses[stage] += 1
        if self._losses[stage] > self._setup.retries:
            self._stop_workers(self._agenda.fail(StageError(message)))
            return
        self.view.say(
            f"starting it again from its last checkpoint ({self._losses[stage]} of "
            f"{self._setup.retries} retries)"
        )
        self._agenda.again(stage)

    def _stop_workers(self, concerns: Concerns) -> None:
        for worker in self._workers:
            if worker.stage is not None and concerns(worker.stage):
                worker.tell(Stop())

    def _pass_on_interrupts(self) -> None:
        if self._interrupts.count > 1:
            for worker in self._workers:
                worker.end(0.0)
            raise self._agenda.interrupted(at_once=True)
        asked = self._interrupts.count == 1 or self.view.stop_requested
        if asked and self._agenda.failure is None:
            self.view.say("stopping once each running stage is saved; Ctrl-C again stops at once")
            self._stop_workers(self._agenda.fail(self._agenda.interrupted(at_once=False)))
