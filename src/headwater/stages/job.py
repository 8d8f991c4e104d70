"""What a stage is given: a picklable job, and the run's services around it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.config.base import Settings
from headwater.config.compute import Compute
from headwater.config.guards import Guards
from headwater.config.stages import Sampling
from headwater.errors import Interrupted
from headwater.plain_json import parse_json
from headwater.stages.alerts import Alert
from headwater.types import Problem
from headwater.world import SOLO, World

if TYPE_CHECKING:
    from headwater.ledger.spending import SpendingAccount
    from headwater.verify.vault import Vault


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage to run: settings, inputs by path, problems without answers, and where to write.

    Random numbers come from (seed, stream, step, problem, sample); `stream` names the stage by
    kind and pool, so that arms which share them draw alike.
    """

    kind: str
    config: Settings
    fingerprint: str
    seed: int
    stream: str
    problems: tuple[Problem, ...]
    prompt_form: str
    sampling: Sampling
    compute: Compute
    output_dir: Path  # the stage writes its result here; the store publishes it whole
    checkpoint_dir: Path  # survives interruption, removed after publishing
    model_dir: Path | None = None  # initial weights
    teacher_dir: Path | None = None
    rollouts_dir: Path | None = None  # a published teacher_rollouts artifact
    teachers: Mapping[str, Path] = field(default_factory=dict)  # source -> instead of either
    base_dir: Path | None = None  # what adapters are relative to; model_dir where not given
    options: Mapping[str, Any] = field(default_factory=dict)  # what only one kind reads
    guards: Guards = field(default_factory=Guards)


def _tell_nobody(alert: Alert) -> None:
    """What becomes of an alert where no person waits; the artifact keeps it all the same."""


@dataclass(slots=True)
class StageContext:
    """Services of the run. `vault` is None for stages that may not see a label.

    strict: an alert ends the stage once it is saved. closing: what ends with the stage, however
    it ends. world: the processes that run it together;
    the services are then those of `stages.ranks`, which all of them may call.
    """

    account: SpendingAccount
    vault: Vault | None
    report_progress: Callable[[Mapping[str, Any]], None]
    stop_requested: Callable[[], bool]
    report_alert: Callable[[Alert], None] = _tell_nobody
    strict: bool = False
    closing: ExitStack = field(default_factory=ExitStack)
    world: World = SOLO

    def raise_if_stopped(self) -> None:
        """Raises Interrupted when the user asked to stop; call it right after a checkpoint."""
        if self.stop_requested():
            raise Interrupted("stopped by the user; run the same command again to continue")


METRICS = "metrics.jsonl"


def metrics_hash(path: Path, step: int) -> str:
    """SHA-256 of the rows of metrics.jsonl before `step`: what a checkpoint at `step` vouches."""
    return hashlib.sha256(_rows_before(path, step)).hexdigest()


def _rows_before(path: Path, step: int) -> bytes:
    """Whole rows of steps before `step`, up to the first that cannot be read."""
    kept = []
    for line in path.read_bytes().splitlines() if step and path.exists() else ():
        try:
            row = parse_json(line)
            if row["step"] >= step:
                continue
        except (ValueError, KeyError, TypeError):  # torn, or overwritten
            break
        kept.append(line)
    return b"".join(line + b"\n" for line in kept)


class MetricsLog:
    """`metrics.jsonl` of a stage: one row a step, cut back to the checkpoint on resume.

    kept: the rows of steps before `resume_step`.
    """

    def __init__(self, path: Path, resume_step: int = 0, spent_seconds: float = 0.0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rewritten = path.with_suffix(".rewritten")
        before = _rows_before(path, resume_step)
        self.kept: list[dict[str, Any]] = [json.loads(line) for line in before.splitlines()]
        rewritten.write_bytes(before)
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._started = time.perf_counter() - spent_seconds

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics; `seconds` is wall time spent on the stage so far."""
        seconds = round(time.perf_counter() - self._started, 3)
        row = {"step": step, "seconds": seconds} | {k: float(v) for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Make every row so far survive a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close; closing twice is harmless."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
