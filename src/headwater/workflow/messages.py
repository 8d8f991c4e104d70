"""What a run and its workers say to each other; everything here is pickled between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater import errors
from headwater.errors import HeadwaterError, StageError
from headwater.stages.job import StageJob
from headwater.types import Label, Problem


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a run is told once. strict: alerts end their stage.

    run_stage: "module:function" that runs one StageJob; limits: the recipe's budget over `stages`
    (None: over whatever the ledger holds). ranks: processes that run each stage together, of
    which the worker is the main one. retries: how often a stage whose process was lost is started
    again. number: of the worker among those at once, from 0; it says which GPUs its ranks take.
    every_step: progress is told of every step, not only a few times a second.
    """

    run_dir: Path
    run_stage: str
    verifier: str = "exact"
    verifier_workers: int = 1
    verifier_timeout_seconds: float = 5.0
    verifier_correct_from: float = 1.0
    limits: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[str, ...] | None = None
    threads: int = 1
    strict: bool = False
    deterministic: bool = False
    ranks: int = 1
    retries: int = 0
    number: int = 0
    every_step: bool = False


@dataclass(frozen=True, slots=True)
class StageTask:
    """One stage for a worker; `labels` is None for stages that may not see any.

    facts: what the manifest will say (kind, parents, config, seed, stream, version). problem_set:
    what the job's problems are called in this run; a worker that was sent a `ProblemSet` of that
    name gets a job without problems.
    """

    job: StageJob
    description: str
    facts: Mapping[str, Any]
    labels: tuple[Label, ...] | None = field(default=None, repr=False)
    problem_set: str | None = None


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems that several stages read: sent to a worker once, and kept there.

    Labels are never kept so: they go along with the stages that may see them.
    """

    name: str
    problems: tuple[Problem, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A function for a worker to call: "module:function" and its arguments."""

    target: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """Save and stop the stage in hand."""


@dataclass(frozen=True, slots=True)
class Quit:
    """Nothing more will come."""


@dataclass(frozen=True, slots=True)
class Rest:
    """This run is over; another may follow. Answered by Done, or by leaving."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Numbers of the stage in hand: step, steps, and whatever it measures."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Warned:
    """An alert of the stage in hand, in words."""

    words: str


@dataclass(frozen=True, slots=True)
class Done:
    """The stage is published, or the call returned `value`."""

    seconds: float = 0.0
    value: Any = None


@dataclass(frozen=True, slots=True)
class Failed:
    """An error, as the name of its class in `headwater.errors` and its message.

    leaves: the worker can do nothing more, and ends.
    """

    error_class: str
    message: str
    leaves: bool = False

    @classmethod
    def of(cls, error: BaseException, doing: str) -> Failed:
        """Any exception as a message; what is not ours becomes a StageError that names it."""
        if isinstance(error, HeadwaterError):
            ours = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
            return cls(ours.__name__, str(error))
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls(StageError.__name__, f"{doing} failed: {found}")

    def error(self) -> HeadwaterError:
        """The error to raise on the other side."""
        found: type[HeadwaterError] = getattr(errors, self.error_class)
        return found(self.message)


ToWorker = StageTask | Call | Stop | Quit | Rest
FromWorker = Progress | Warned | Done | Failed
