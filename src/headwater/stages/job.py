"""What a stage is given: a picklable job, and the run's services around it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.config.base import Settings
from headwater.config.recipe import Compute
from headwater.config.stages import Sampling
from headwater.errors import Interrupted
from headwater.plain_json import parse_json
from headwater.types import Problem

if TYPE_CHECKING:
    from headwater.ledger.ledger import Account
    from headwater.verify.vault import LabelVault


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
    options: Mapping[str, Any] = field(default_factory=dict)  # what only one kind reads


@dataclass(slots=True)
class StageContext:
    """Services of the run. `vault` is None for stages that may not see a label."""

    account: Account
    vault: LabelVault | None
    report_progress: Callable[[Mapping[str, Any]], None]
    stop_requested: Callable[[], bool]

    def raise_if_stopped(self) -> None:
        """Raises Interrupted when the user asked to stop; call it right after a checkpoint."""
        if self.stop_requested():
            raise Interrupted("stopped by the user; run the same command again to continue")


class MetricsLog:
    """`metrics.jsonl` of a stage: one row a step, cut back to the checkpoint on resume."""

    def __init__(self, path: Path, resume_step: int = 0, spent_seconds: float = 0.0) -> None:
        self.path = path
        kept = []
        if resume_step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = parse_json(line)
                except ValueError:  # a torn last line
                    break
                if row["step"] < resume_step:
                    kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        rewritten = path.with_suffix(".rewritten")
        rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._started = time.perf_counter() - spent_seconds

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics; `seconds` is wall time spent on the stage so far."""
        seconds = round(time.perf_counter() - self._started, 3)
        row = {"step": step, "seconds": seconds} | {k: float(v) for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close; closing twice is harmless."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
