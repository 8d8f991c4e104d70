"""Stages for the tests of trackers: real metrics and rollouts, checkpointed every second step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

import workflow_stages
from headwater.stages.job import METRICS, MetricsLog, StageContext, StageJob

#: A file in the run folder's parent: a stage kind that once kills its run after the last step.
KILL_RUN = "kill-run"
STEPS = 4


def loss(step: int) -> float:
    """The loss of a step, counted from 0."""
    return 1.0 / (step + 1)


def run_stage(job: StageJob, context: StageContext) -> None:
    """Four steps; what trains nothing is as in the workflow's tests."""
    if job.kind in ("source", "evaluate", "probe"):
        workflow_stages.run_stage(job, context)
        return
    saved = job.checkpoint_dir / "state.json"
    done = json.loads(saved.read_text())["done"] if saved.exists() else 0
    context.account.rewind(0)
    log = MetricsLog(job.checkpoint_dir / METRICS, done)
    for step in range(done, STEPS):
        log.write(step, {"loss": loss(step), "kl": 0.5 * step, "trained_tokens": 10.0})
        context.report_progress({"step": step + 1, "total": STEPS, "loss": loss(step)})
        if step % 2 == 1 and step + 1 < STEPS:
            part = job.checkpoint_dir / "rollouts" / f"part-{step + 1:09d}.parquet"
            part.parent.mkdir(exist_ok=True)
            _keep(job, range(step + 1), part)
            saved.write_text(json.dumps({"done": step + 1}))
    order = job.output_dir.parents[2] / KILL_RUN
    if order.exists() and order.read_text() == job.kind:
        _kill_run(job, order)
    log.close()
    (job.output_dir / "model").mkdir()
    (job.output_dir / "model" / "value.json").write_text(json.dumps({"value": job.fingerprint}))
    shutil.copyfile(log.path, job.output_dir / METRICS)
    _keep(job, range(STEPS), job.output_dir / "rollouts.parquet")


def _keep(job: StageJob, steps: range, path: Path) -> None:
    rows = [_rollout(job, step, sample) for step in steps for sample in range(2)]
    parquet.write_table(pa.Table.from_pylist(rows), path)


def _rollout(job: StageJob, step: int, sample: int) -> dict:
    graded = job.kind == "grpo"
    return {
        "stage": job.fingerprint,
        "step": step,
        "problem_id": job.problems[0].id if job.problems else "none",
        "sample": sample,
        "prompt": "1+1=",
        "response": f"{job.kind} {step} {sample}",
        "verdict": ("incorrect", "correct")[sample] if graded else None,
        "reward": float(sample) if graded else None,
        "response_tokens": 2,
        "finish_reason": "stop",
        "advantage": 2.0 * sample - 1.0 if graded else None,
    }


def _kill_run(job: StageJob, order: Path) -> None:
    """Kill the run once its tracker has all of the last step, and this process with it."""
    folder = job.output_dir.parents[1] / "trackers" / "tensorboard"
    name = f"*/{job.kind}-*/*/{job.fingerprint[:8]}/events.*"
    while sum(path.read_bytes().count(b"num_tokens") for path in folder.glob(name)) < STEPS:
        time.sleep(0.02)
    order.unlink()
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
