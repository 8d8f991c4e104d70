"""Small real stages for the workflow's tests: no model, but vault, ledger, checkpoints and files.

A stage counts to its number of steps. Its "model" is a number that follows from its parents,
its settings and its seed, so that any difference in what a run computed shows in a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from disk_faults import fill_disk
from headwater.errors import InputError, StageError
from headwater.seeding import derive_key
from headwater.stages.alerts import Alert, write_alerts
from headwater.stages.job import StageContext, StageJob
from headwater.tasks.readings import Reading

#: Files in the run folder's parent that tell a stage to misbehave once.
KILL, STALL, DEAF, FAIL, CRASH = "kill", "stall", "deaf", "fail", "crash"
FULL, VANISH = "full", "vanish"
#: A file in the run folder's parent: the stage kind that raises this alert whenever it runs.
ALERT = "alert"
RAISED = Alert("kl_rise_nats", "kl", 2, 1.5, 0.5, "step 2 of 4: KL is 1.5", "a <cause>", "a cure")


def run_stage(job: StageJob, context: StageContext) -> None:
    """One stage: `steps` steps of a running hash, checkpointed at each."""
    world = job.output_dir.parents[2]
    if context.world.is_main:
        with (world / "ran.txt").open("a") as log:
            log.write(f"{job.kind} {job.fingerprint} {os.getpid()}\n")
    if job.kind == "evaluate":
        _evaluate(job, context)
        return
    if job.kind == "probe":
        assert context.vault is None and job.teacher_dir is not None
        context.account.charge(prompts=len(job.problems), teacher_scored_tokens=7)
        (job.output_dir / "probe.json").write_text(json.dumps({"reverse_kl": 0.5}))
        return
    if job.kind == "source":
        _publish(job, f"{job.config} {job.seed}")
        if (world / "config.json").is_file():
            shutil.copy(world / "config.json", job.output_dir / "model")
        return
    state = context.world.from_main(lambda: _state(job))
    context.account.rewind(state["position"])
    for step in range(state["done"], getattr(job.config, "steps", None) or 2):
        if job.kind == "grpo":
            assert context.vault is not None
            context.vault.grade(context.account, [(job.problems[step].id, "\\boxed{1}")])
        else:
            assert context.vault is None or job.kind == "sft"
        context.account.charge(updates=1, seconds=0.5)
        drawn = derive_key(job.seed, job.stream, step)
        state = {
            "done": step + 1,
            "value": hashlib.sha256(f"{state['value']} {drawn}".encode()).hexdigest(),
            "position": context.account.position(),
        }
        _misbehave(world, job, step, context)
        if context.world.is_main:
            _write(job.checkpoint_dir / "state.json", state)
        context.world.gather(step)
        context.report_progress({"step": step + 1, "total": 4, "loss": 1 / (step + 1)})
        if step == 1 and _alerts(world, job):
            context.report_alert(RAISED)
            if context.strict:
                raise StageError(f"{RAISED.words}; run without --strict")
        context.raise_if_stopped()
    if context.world.is_main:
        _publish(job, state["value"])
        write_alerts(_alerts(world, job), job.output_dir)


def same_tokenizer(student_dir: Path, teacher_dir: Path) -> int:
    """Two models that can be bridged."""
    assert student_dir != teacher_dir
    return 64


def other_tokenizer(student_dir: Path, teacher_dir: Path) -> int:
    """Two models that cannot."""
    raise InputError(f"{student_dir.name} and {teacher_dir.name} differ; use one tokenizer")


def fits(model_dir: Path, name: str, prompt_form: str, readings: tuple[Reading, ...]) -> None:
    """A model that can read what it is asked; says what that was."""
    world = model_dir.parents[3]
    rows = [
        [r.where, len(r.problems), r.max_new_tokens, *r.responses]
        for r in sorted(readings, key=str)
    ]
    with (world / "read.txt").open("a") as log:
        log.write(json.dumps([name, prompt_form, rows]) + "\n")


def too_long(model_dir: Path, name: str, prompt_form: str, readings: tuple[Reading, ...]) -> None:
    """A model that cannot."""
    raise InputError(f"{name} has 10 positions; choose a longer one")


def _misbehave(world: Path, job: StageJob, step: int, context: StageContext) -> None:
    """Do once what a file named like the misbehaviour, holding a stage kind, asks for."""
    name = context.world.from_main(lambda: _ordered(world, job, step))
    if name == KILL and context.world.is_main:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == FAIL:
        raise InputError("value=3 found; expected 4; set it to 4")
    if name == CRASH:
        if context.world.size > 1 and context.world.is_main:
            time.sleep(1.0)  # the main rank has more to close
        raise KeyError("missing")
    if name == FULL:
        fill_disk(world / "run")
    if name == VANISH:
        assert job.model_dir is not None
        shutil.rmtree(job.model_dir.parent)
    if name in (STALL, DEAF):
        deadline = time.monotonic() + 30
        while (name == DEAF or not context.stop_requested()) and time.monotonic() < deadline:
            time.sleep(0.01)


def _ordered(world: Path, job: StageJob, step: int) -> str | None:
    """The misbehaviour that is asked for here, which is then no longer."""
    for name in (KILL, STALL, DEAF, FAIL, CRASH, FULL, VANISH):
        order = world / name
        if step == 2 and order.is_file() and order.read_text() == job.kind:
            order.rename(world / f"{name}.done")
            return name
    return None


def _alerts(world: Path, job: StageJob) -> list[Alert]:
    order = world / ALERT
    return [RAISED] if order.is_file() and order.read_text() == job.kind else []


def _state(job: StageJob) -> dict:
    path = job.checkpoint_dir / "state.json"
    if path.exists():
        return json.loads(path.read_text())
    leftovers = [p.name for p in job.output_dir.iterdir()]
    assert leftovers == [], leftovers
    parents = [
        json.loads((folder / "value.json").read_text())["value"]
        for folder in (job.model_dir, job.teacher_dir)
        if folder is not None
    ]
    if job.rollouts_dir is not None:
        parents.append((job.rollouts_dir / "model" / "value.json").read_text())
    start = [job.kind, job.config.model_dump(mode="json"), parents, [p.id for p in job.problems]]
    return {"done": 0, "value": json.dumps(start), "position": 0}


def _evaluate(job: StageJob, context: StageContext) -> None:
    assert context.vault is not None and job.model_dir is not None
    value = (job.model_dir / "value.json").read_text()
    rows = []
    for problem in job.problems:
        for attempt in range(job.config.attempts):
            answer = derive_key(value, job.seed, problem.id, attempt) % 2
            (grade,) = context.vault.grade(context.account, [(problem.id, f"\\boxed{{{answer}}}")])
            rows.append(
                {
                    "problem_id": problem.id,
                    "attempt": attempt,
                    "verdict": grade.verdict.value,
                    "response_tokens": 3 + answer,
                    "truncated": False,
                }
            )
    rows.reverse()  # readers must not rely on the order
    if context.world.is_main:
        parquet.write_table(pa.Table.from_pylist(rows), job.output_dir / "attempts.parquet")


def _publish(job: StageJob, value: str) -> None:
    (job.output_dir / "model").mkdir(exist_ok=True)
    _write(job.output_dir / "model" / "value.json", {"value": value})


def _write(path: Path, value: dict) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value))
    beside.replace(path)
