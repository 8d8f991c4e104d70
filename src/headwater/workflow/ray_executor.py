"""Runs a graph's stages as tasks of a Ray cluster.

Ray queues tasks by the resources they ask for, starts a task again whose process or node was lost,
and forms the process groups of stages that several ranks share. Ours is what a stage is: its
attempts, folders and account are kept on the machine of the run (`attempts`), so that the ledger
is written on one machine only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headwater.config.compute import Compute
from headwater.errors import BudgetExhausted, Interrupted, StageError
from headwater.workflow.agenda import Agenda, Concerns
from headwater.workflow.attempts import Attempts, Offer, Started
from headwater.workflow.cluster import (
    RAY_ENVIRONMENT,
    connected,
    last_line,
    require_nodes,
    require_room,
    serve,
    uses_gpu,
)
from headwater.workflow.graph import Graph
from headwater.workflow.interrupts import Interrupts
from headwater.workflow.launch import worker_environment
from headwater.workflow.messages import Done, Failed, Progress, StageTask, WorkerSetup
from headwater.workflow.nodes import TOKEN_FILE, import_path, leave_token
from headwater.workflow.progress import ProgressView
from headwater.workflow.ray_tasks import TRAIN_FOLDER, Place, call, run_alone, run_on_ranks

#: How often a lost stage is started again where `compute.retries` does not say.
RETRIES = 3
_LISTEN_SECONDS = 0.2
_CLOSE_SECONDS = 10.0


class RayExecutor:
    """A run's stages on a cluster; a context that connects to it and leaves it as it was.

    As `executor.Executor` otherwise. address: "auto" (the cluster of this machine), "local" (one
    of this machine's cores, for this run), or HOST:PORT. most: the largest number of stages at
    once, None for as many as there are resources.
    """

    def __init__(
        self,
        graph: Graph,
        setup: WorkerSetup,
        most: int | None,
        task_of: Callable[[str], StageTask],
        view: ProgressView,
        address: str,
        compute: Compute,
    ) -> None:
        self.view = view
        self._graph = graph
        self._setup = setup
        self._most = most
        self._task_of = task_of
        self._address = address
        self._compute = compute
        self._retries = RETRIES if compute.retries is None else compute.retries
        self._agenda = Agenda(graph)
        self._tasks: dict[str, Any] = {}  # stage in hand or queued by Ray -> reference
        self._problem_sets: dict[str, Any] = {}
        self._leaving = ExitStack()

    def __enter__(self) -> Self:
        """Connect and check every node. Raises InputError naming what is wrong, and the cure."""
        with ExitStack() as stack:
            ray = self._ray = connected(self._address, stack)
            setup = self._setup
            environment = worker_environment(setup) | RAY_ENVIRONMENT
            environment["PYTHONPATH"] = import_path()
            place = self._place = Place(
                setup=setup,
                folder=Path.cwd(),
                token=leave_token(setup.run_dir),
                environment=environment,
                ranks=self._compute.ranks,
                cpus=setup.threads,
                gpu=uses_gpu(ray, self._compute),
                retries=self._retries,
            )
            stack.callback((setup.run_dir / TOKEN_FILE).unlink, missing_ok=True)
            stack.callback(partial(shutil.rmtree, setup.run_dir / TRAIN_FOLDER, ignore_errors=True))
            require_room(ray, place.ranks, place.cpus, place.gpu)
            require_nodes(ray, setup, place.folder, environment)
            self._service = serve(ray, Attempts, environment, setup, self._retries)
            stack.callback(self._close_service)
            self._interrupts = stack.enter_context(Interrupts())
            self._leaving = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving.__exit__(exc_type, exc, traceback)

    def run(self, wanted: Iterable[str], published: Iterable[str]) -> BudgetExhausted | None:
        """Run the `wanted` stages that are not yet `published`; parents must be in one of both.

        Returns the error of a budget that ended the run early; raises Interrupted once every
        stage in hand is saved, and StageError for one that failed or was lost too often.
        """
        self._agenda.queue(wanted, published)
        while True:
            self._pass_on_interrupts()
            self._submit()
            if not self._tasks:
                return self._agenda.outcome()
            self._listen()

    def call(self, target: str, *arguments: Any) -> Any:
        """Call "module:function" in a task and return what it returns, or raise."""
        remote = self._remote(call, num_cpus=self._place.cpus)
        try:
            reply = self._ray.get(remote.remote(self._place, target, arguments))
        except self._ray.exceptions.RayError as error:
            raise StageError(f"{target}: its process was lost ({last_line(error)})") from None
        if isinstance(reply, Done):
            return reply.value
        raise reply.error()

    def _submit(self) -> None:
        """Hand ready stages to Ray, the most urgent first."""
        while self._most is None or len(self._tasks) < self._most:
            fingerprint = self._agenda.next()
            if fingerprint is None:
                return
            task = self._task_of(fingerprint)
            job = task.job
            self._ask(
                self._service.offer, Offer(fingerprint, job.kind, task.description, task.labels)
            )
            problems = self._problems(task)
            task = replace(task, job=replace(job, problems=()), labels=None)
            if self._place.ranks > 1 and job.kind != "source":
                run, resources = run_on_ranks, {"num_cpus": 0}
            else:
                gpu = self._place.gpu and job.kind != "source"
                run, resources = run_alone, {"num_cpus": self._place.cpus, "num_gpus": int(gpu)}
            remote = self._remote(run, **resources)
            self._tasks[fingerprint] = remote.remote(self._service, self._place, task, problems)

    def _problems(self, task: StageTask) -> list[Any]:
        """A reference to the task's problems, which are in the object store once."""
        name = task.problem_set or task.job.fingerprint
        if name not in self._problem_sets:
            self._problem_sets[name] = self._ray.put(task.job.problems)
        return [self._problem_sets[name]]

    def _remote(self, function: Callable[..., Any], **resources: float) -> Any:
        options = {
            "max_retries": self._retries,
            "runtime_env": {"env_vars": self._place.environment},
        }
        return self._ray.remote(function).options(**options, **resources)

    def _listen(self) -> None:
        """Take what attempts tell and what has ended within a moment."""
        by_reference = {reference: stage for stage, reference in self._tasks.items()}
        ended, _ = self._ray.wait(
            list(by_reference), num_returns=1, timeout=_LISTEN_SECONDS, fetch_local=False
        )
        for stage, message in self._ask(self._service.news):
            if isinstance(message, Started):
                self._started(stage, message.attempt)
            elif stage in self.view.running:
                if isinstance(message, Progress):
                    self.view.progressed(stage, message.values)
                else:
                    self.view.warned(stage, message.words)
        for reference in ended:
            self._end(by_reference[reference], reference)

    def _started(self, stage: str, attempt: int) -> None:
        self.view.started(stage)
        if attempt > 1:
            self.view.say(
                f"{self._graph.describe(stage)}: its process was lost; attempt {attempt} goes on "
                "from the last checkpoint"
            )

    def _end(self, stage: str, reference: Any) -> None:
        del self._tasks[stage]
        exceptions = self._ray.exceptions
        try:
            reply = self._ray.get(reference)
        except exceptions.TaskCancelledError:
            reply = Failed(Interrupted.__name__, "stopped before it began")
        except exceptions.RayError as error:
            message = (
                f"{self._graph.describe(stage)}: its process was lost ({last_line(error)}); "
                f"expected at most {self._retries} losses: look for too little memory or a failing "
                "node, and run again to continue"
            )
            reply = Failed(StageError.__name__, message)
        if isinstance(reply, Done):
            self._agenda.finish(stage)
            self.view.finished(stage, reply.seconds)
        else:
            failure = reply.error()
            if stage in self.view.running:
                self.view.stopped(stage, str(failure))
            self._stop(self._agenda.take_error(failure))

    def _stop(self, concerns: Concerns) -> None:
        """Ask stages in hand to save and stop; those that Ray still queues never start."""
        stages = [stage for stage in self._tasks if concerns(stage)]
        if stages:
            for stage in self._ask(self._service.stop, stages):
                self._ray.cancel(self._tasks[stage])

    def _pass_on_interrupts(self) -> None:
        if self._interrupts.count > 1:
            for reference in self._tasks.values():
                self._ray.cancel(reference, force=True)
            raise self._agenda.interrupted(at_once=True)
        asked = self._interrupts.count == 1 or self.view.stop_requested
        if asked and self._agenda.failure is None:
            self.view.say("stopping once each running stage is saved; Ctrl-C again stops at once")
            self._stop(self._agenda.fail(self._agenda.interrupted(at_once=False)))

    def _ask(self, method: Any, *arguments: Any) -> Any:
        try:
            return self._ray.get(method.remote(*arguments))
        except self._ray.exceptions.RayError as error:
            raise StageError(
                f"the process that keeps the run's ledger was lost ({last_line(error)}); expected "
                "it to live as long as the run: look for too little memory, and run again to "
                "continue"
            ) from None

    def _close_service(self) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._service.close.remote(), timeout=_CLOSE_SECONDS)
            self._ray.kill(self._service)
