"""Small real stages for the tests of stages: models, problems, jobs, and what a run left."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file

from headwater.config.base import Settings
from headwater.config.compute import Compute
from headwater.config.recipe import ModelSpec
from headwater.config.stages import PretrainStage, Sampling
from headwater.errors import Interrupted
from headwater.ledger import Ledger
from headwater.stages.alerts import Alert, read_alerts
from headwater.stages.job import StageContext, StageJob
from headwater.stages.ranks import context_of_rank
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.verify.vault import LabelVault
from headwater.verify.verifiers import make_verifier
from headwater.workflow.graph import EVALUATES
from headwater.workflow.registry import run_stage
from headwater.world import World

TASK = "task:arithmetic?steps=1-2&count=10&seed=3&operations=%2B-"
TASK = TASK.replace("%2B", "+")
SAMPLING = Sampling(max_new_tokens=10)
#: Differs from run to run: how long things took.
TIMES = {"seconds", "tokens_per_second", "sampling_seconds", "training_seconds"}


@functools.cache
def problems() -> LabelledProblems:
    """Ten problems of one or two steps."""
    return load_problems(TASK)


def make_job(kind: str, config: Settings, folder: Path, **changes: Any) -> StageJob:
    """A job of `kind` that writes below `folder`."""
    values: dict[str, Any] = {
        "kind": kind,
        "config": config,
        "fingerprint": f"{kind}-0123456789",
        "seed": 1,
        "stream": f"{kind}/labels",
        "problems": problems().problems,
        "prompt_form": "bare",
        "sampling": SAMPLING,
        "compute": Compute(device="cpu", precision="float32"),
        "output_dir": folder / "out",
        "checkpoint_dir": folder / "checkpoint",
    }
    return StageJob(**(values | changes))


@dataclass
class Run:
    """One stage in one folder, run as often as asked: its ledger, progress and results."""

    job: StageJob
    labels: bool = False  # whether the stage gets a vault
    verifier: str = "exact"
    limits: Mapping[str, float] = field(default_factory=dict)
    progress: list[Mapping[str, Any]] = field(default_factory=list)
    strict: bool = False
    told: list[Alert] = field(default_factory=list)

    def start(self, stop_at: int | None = None, world: World | None = None) -> Run:
        """Run to the end, or be asked to stop once step `stop_at` is done.

        world: of several ranks, of which this is the main one.
        """
        kind = "eval" if self.job.kind in EVALUATES else "train"
        self.job.output_dir.mkdir(parents=True, exist_ok=True)
        self.job.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        with self.ledger() as ledger, make_verifier(self.verifier) as verifier:
            vault = LabelVault(problems().labels, verifier) if self.labels else None
            account = ledger.account(self.job.fingerprint, kind)
            stop = self._stopper(stop_at)
            context = StageContext(
                account, vault, self.progress.append, stop, self.told.append, self.strict
            )
            if world is not None:
                context = context_of_rank(world, context, has_vault=self.labels, strict=self.strict)
            run_stage(self.job, context)
        return self

    def follow(self, world: World) -> None:
        """Run as a rank other than the main one."""
        context = context_of_rank(world, None, has_vault=self.labels, strict=self.strict)
        run_stage(self.job, context)

    def interrupted_at(self, step: int) -> Run:
        """Run until step `step` is done and the stage obeys."""
        try:
            self.start(stop_at=step)
        except Interrupted:
            assert self.progress[-1]["step"] == step
            return self
        raise AssertionError(f"the stage did not stop at step {step}")

    def _stopper(self, stop_at: int | None) -> Callable[[], bool]:
        return lambda: bool(self.progress) and self.progress[-1]["step"] == stop_at

    def ledger(self) -> Ledger:
        """The run's ledger."""
        return Ledger(self.job.output_dir.parent / "ledger.sqlite", dict(self.limits))

    def spent(self, physical: bool = False) -> dict[str, float]:
        """Counts of the stage, without how long it took and how much memory."""
        kind = "eval" if self.job.kind in EVALUATES else "train"
        with self.ledger() as ledger:
            total = ledger.physical(kind) if physical else ledger.spending(None, kind)
        found = total.as_dict()
        assert found.pop("seconds") > 0 or not found["updates"]
        found.pop("peak_memory_bytes")
        return found

    @property
    def model_dir(self) -> Path:
        """The model folder written."""
        return self.job.output_dir / "model"

    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.jsonl without times."""
        text = (self.job.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]

    def alerts(self) -> tuple[Alert, ...]:
        """What the artifact says of its alerts."""
        return read_alerts(self.job.output_dir)

    def rollouts(self) -> list[dict[str, Any]]:
        """Rows of rollouts.parquet; none where the stage draws none."""
        path = self.job.output_dir / "rollouts.parquet"
        return pq.read_table(path).to_pylist() if path.exists() else []

    def assert_equals(self, other: Run) -> None:
        """Both left the same, bit for bit, but for times."""
        assert self.metrics() == other.metrics()
        assert self.rollouts() == other.rollouts()
        assert self.spent() == other.spent()
        ours, theirs = (load_file(run.model_dir / "model.safetensors") for run in (self, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name


def make_model(name: str, folder: Path, *, steps: int) -> Path:
    """An embedded model that boxes a digit most of the time; returns its folder."""
    source = Run(make_job("source", ModelSpec(source=name), folder / "source")).start()
    config = PretrainStage(
        steps=steps,
        batch_size=24,
        lr=4e-3,
        warmup_steps=3,
        worked=0.25,
        careless=0.0,
        guessed=0.75,
    )
    job = make_job(
        "pretrain",
        config,
        folder / "pretrain",
        model_dir=source.model_dir,
        options={"train": TASK, "evals": []},
    )
    return Run(job).start().model_dir
