"""One stage in the hands of a process: begun, run with the run's services, and published.

The same for a worker of this machine and for a task of a cluster; what differs is who keeps the
stage's folders and account, and how progress is told.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from headwater.errors import HeadwaterError, StageError
from headwater.ledger import Ledger
from headwater.ledger.ledger import Kind
from headwater.ledger.spending import SpendingAccount
from headwater.redaction import redact
from headwater.stages.job import StageContext, StageJob
from headwater.storage import disk_error
from headwater.types import Label
from headwater.verify.grading import Verifier
from headwater.verify.verifiers import make_verifier
from headwater.workflow.accounts import write_statement
from headwater.workflow.graph import EVALUATES
from headwater.workflow.messages import Done, Failed, StageTask, WorkerSetup
from headwater.workflow.store import ArtifactStore

RunStage = Callable[[StageJob, StageContext], None]


@dataclass(frozen=True, slots=True)
class Begun:
    """A stage in hand: the job with the folders it writes to, the account it is charged to, and
    its labels; None where it may not see any."""

    job: StageJob
    account: SpendingAccount
    labels: tuple[Label, ...] | None


class Keeper(Protocol):
    """Who keeps the folders and the account of a stage while it runs."""

    def begin(self, task: StageTask) -> Begun:
        """Make its folders ready. Raises StageError where a parent is gone."""
        ...

    def publish(self, task: StageTask, seconds: float) -> None:
        """Make what it wrote an artifact, with the closing statement of its account."""
        ...


class LocalKeeper:
    """Keeps stages in a run folder and a ledger of this machine."""

    def __init__(self, store: ArtifactStore, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger

    def begin(self, task: StageTask) -> Begun:
        """Make its folders ready. Raises StageError where a parent is gone."""
        require_parents(task, self._store)
        account = self._ledger.account(task.job.fingerprint, account_kind(task.job.kind))
        if not self._store.begin(task.job.fingerprint):
            account.rewind(0)
        return Begun(task.job, account, task.labels)

    def publish(self, task: StageTask, seconds: float) -> None:
        """Make what it wrote an artifact, with the closing statement of its account."""
        job = task.job
        write_statement(self._ledger, job.fingerprint, account_kind(job.kind), job.output_dir)
        self._store.publish(job.fingerprint, closing_facts(task, seconds))


def run_begun(job: StageJob, context: StageContext, setup: WorkerSetup) -> float:
    """Run a stage that has begun; returns its seconds in this process."""
    started = time.perf_counter()
    run_stage: RunStage = load_function(setup.run_stage)
    run_stage(job, context)
    return time.perf_counter() - started


def account_kind(stage_kind: str) -> Kind:
    """The account a stage of this kind is charged to."""
    return "eval" if stage_kind in EVALUATES else "train"


def closing_facts(task: StageTask, seconds: float) -> dict[str, Any]:
    """What the manifest says of a stage that took `seconds`."""
    return {**task.facts, "seconds": round(seconds, 3)}


def require_parents(task: StageTask, store: ArtifactStore) -> None:
    """Raise StageError where an artifact that a stage reads is gone or damaged."""
    for parent in task.facts["parents"]:
        if store.get(parent) is None:
            raise StageError(
                f"{store.path(parent)}: what {task.description} reads is gone; leave the run "
                "folder alone while it is used, and run again to rebuild it"
            )


def verifier_of(setup: WorkerSetup) -> Verifier:
    """The run's verifier, with processes of its own; to be closed."""
    return make_verifier(
        setup.verifier,
        workers=setup.verifier_workers,
        timeout_seconds=setup.verifier_timeout_seconds,
        correct_from=setup.verifier_correct_from,
    )


def reply_of(
    work: Callable[[], Done], doing: str, run_dir: Path, log: Path | None = None
) -> Done | Failed:
    """What `work` returns, or its error as a message: where a process ends, nothing is raised.

    doing: what it is, for errors that are not ours, whose traceback goes to the file `log`, by
    default to stderr.
    """
    try:
        return work()
    except HeadwaterError as error:
        return Failed.of(error, doing)
    except Exception as error:
        with suppress(OSError):  # the log may lie on the disk that is full
            _note(redact(traceback.format_exc()), log)
        told = disk_error(error, run_dir)
        return Failed.of(error if told is None else StageError(f"{doing}: {told}"), doing)


def _note(text: str, log: Path | None) -> None:
    if log is None:
        print(text, file=sys.stderr)
    else:
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(text)


def load_function(target: str) -> Callable[..., Any]:
    """The function "module:name" names. Raises ImportError or AttributeError."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def return_memory() -> None:
    """Give freed memory back to the system, so that idle processes do not hold models' pages."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from musl
        if trim is not None:
            trim(0)
