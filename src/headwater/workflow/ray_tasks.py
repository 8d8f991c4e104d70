"""What a task of a cluster does: one attempt at a stage, alone or as one of several ranks."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from headwater.errors import BudgetExhausted, Interrupted, RankLost, StageError
from headwater.stages.job import StageContext, StageJob
from headwater.stages.ranks import context_of_rank
from headwater.types import Problem
from headwater.verify.vault import LabelVault
from headwater.workflow.attempt import Ask, Attempt
from headwater.workflow.attempts import Claim
from headwater.workflow.cluster import fetch, on_ranks
from headwater.workflow.messages import Done, Failed, StageTask, WorkerSetup
from headwater.workflow.nodes import enter, require_token
from headwater.workflow.stage_run import (
    load_function,
    reply_of,
    return_memory,
    run_begun,
    verifier_of,
)
from headwater.workflow.store import ArtifactStore, worker_lock
from headwater.world import SOLO, World

#: Where Ray Train keeps what it needs, in the run folder; removed when the run ends.
TRAIN_FOLDER = "ray"
#: Errors that all ranks of a stage raise together: none of them waits for another one.
_TOGETHER = {BudgetExhausted.__name__, Interrupted.__name__}


@dataclass(frozen=True, slots=True)
class Place:
    """What a task needs to know of its run. folder: where the run was started; token: the run
    folder's. `ranks` processes share a stage, with `cpus` cores and, where `gpu`, a GPU each."""

    setup: WorkerSetup
    folder: Path
    token: str
    environment: dict[str, str]
    ranks: int
    cpus: int
    gpu: bool
    retries: int


def call(place: Place, target: str, arguments: Sequence[Any]) -> Done | Failed:
    """What "module:function" returns, or its error."""
    enter(place.folder)
    work = partial(load_function(target), *arguments)
    return reply_of(lambda: Done(value=work()), target, place.setup.run_dir)


def run_alone(
    service: Any, place: Place, task: StageTask, problems: Sequence[Any]
) -> Done | Failed:
    """A stage that one process runs: claim it, run it, publish it.

    service: the actor that holds `attempts.Attempts`; problems: a reference to them.
    """
    return _run(service, place, task, problems, SOLO)


def run_on_ranks(
    service: Any, place: Place, task: StageTask, problems: Sequence[Any]
) -> Done | Failed:
    """A stage that several processes share, which Ray Train starts, and again where one is lost."""
    stage = task.job.fingerprint
    try:
        return on_ranks(
            _run_rank,
            {"arguments": (service, place, task, list(problems))},
            name=stage,
            storage=place.setup.run_dir / TRAIN_FOLDER,
            ranks=place.ranks,
            resources={"CPU": place.cpus} | ({"GPU": 1} if place.gpu else {}),
            environment=place.environment,
            retries=place.retries,
        )
    except StageError as error:
        ending: Done | Failed | None = _asking(service)("ending", stage)
        return ending or Failed.of(StageError(f"{task.description}: {error}"), stage)


def _run_rank(config: dict[str, Any]) -> Done | Failed:
    """One rank of a stage, in the process group that Ray Train made."""
    from headwater.engine.ranks import joined_world

    service, place, task, problems = config["arguments"]
    return _run(service, place, task, problems, joined_world())


def _run(
    service: Any, place: Place, task: StageTask, problems: Sequence[Any], world: World
) -> Done | Failed:
    """This rank's part of a stage. An error that ends the stage is told to the run first.

    A rank that fails alone leaves the others waiting: it raises, so that Ray ends all of them.
    """
    setup, part = place.setup, _Part(_asking(service), world)
    log = setup.run_dir / "logs" / f"{task.job.fingerprint}.log"
    reply = reply_of(lambda: part.run(place, task, problems), task.description, setup.run_dir, log)
    return_memory()
    if isinstance(reply, Failed):
        part.fail(task.job.fingerprint, reply)
        if world.size > 1 and reply.error_class not in _TOGETHER:
            raise StageError(reply.message)
    return reply


class _Part:
    """What one rank does of one attempt at a stage."""

    def __init__(self, ask: Ask, world: World) -> None:
        self._ask = ask
        self._world = world
        self._number = 0  # of the attempt, once it has begun
        self._attempt: Attempt | None = None  # of the main rank, like its context
        self._context: StageContext | None = None
        self._may_be_anothers = False

    def run(self, place: Place, task: StageTask, problems: Sequence[Any]) -> Done:
        """Claim the stage, run it, publish it; all ranks together."""
        try:
            with ExitStack() as leaving:
                return self._run(place, task, problems, leaving)
        except (RankLost, RuntimeError):  # so libraries say, too, that another rank is gone
            self._may_be_anothers = self._world.size > 1
            raise

    def fail(self, stage: str, failed: Failed) -> None:
        """Tell the run that the stage is not to be tried again, unless another rank was lost."""
        if self._number and not self._may_be_anothers:
            with suppress(StageError):  # an attempt that was taken for lost
                self._ask("fail", stage, self._number, failed)

    def _run(
        self, place: Place, task: StageTask, problems: Sequence[Any], leaving: ExitStack
    ) -> Done:
        setup, world = place.setup, self._world
        enter(place.folder)
        require_token(setup.run_dir, place.token)
        leaving.enter_context(_shared_lock(setup.run_dir))
        found: tuple[Problem, ...] = fetch(problems[0])
        begun = world.from_main(lambda: self._begin(setup, task, leaving))
        if isinstance(begun, Done):
            return begun
        self._number = begun.attempt
        context = self._context
        if world.size > 1 or context is None:
            context = context_of_rank(
                world, context, has_vault=begun.has_vault, strict=setup.strict
            )
        seconds = run_begun(replace(begun.job, problems=found), context, setup)
        world.from_main(lambda: self._publish(task, seconds))
        return Done(seconds)

    def _begin(self, setup: WorkerSetup, task: StageTask, leaving: ExitStack) -> _Begun | Done:
        """The main rank's part: everything that is asked of the run, and the vault."""
        stage = task.job.fingerprint
        claim: Claim | Done = self._ask("claim", stage)
        if isinstance(claim, Done):
            return claim
        self._number = claim.attempt
        attempt = self._attempt = Attempt(self._ask, stage, claim, _store_of(setup.run_dir))
        begun = attempt.begin(task)
        vault = None
        if begun.labels is not None:
            vault = LabelVault(begun.labels, leaving.enter_context(closing(verifier_of(setup))))
        self._context = StageContext(
            begun.account,
            vault,
            attempt.report_progress,
            attempt.stop_requested,
            attempt.report_alert,
            setup.strict,
        )
        return _Begun(begun.job, claim.attempt, vault is not None)

    def _publish(self, task: StageTask, seconds: float) -> None:
        assert self._attempt is not None
        self._attempt.publish(task, seconds)


@dataclass(frozen=True, slots=True)
class _Begun:
    """What every rank is told of a stage that has begun."""

    job: StageJob
    attempt: int
    has_vault: bool


def _asking(service: Any) -> Ask:
    def ask(question: str, *arguments: Any) -> Any:
        reply = fetch(service.ask.remote(question, *arguments))
        if isinstance(reply, Done):
            return reply.value
        raise reply.error()

    return ask


@cache
def _store_of(run_dir: Path) -> ArtifactStore:
    """The run's artifacts; once a process, which checks the hashes of what it reads once."""
    return ArtifactStore(run_dir)


@contextmanager
def _shared_lock(run_dir: Path) -> Iterator[None]:
    """While it is held, no other run of this folder begins, where its storage has locks."""
    with worker_lock(run_dir).open("a") as lock:
        with suppress(OSError):  # attempts are told apart without it
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
