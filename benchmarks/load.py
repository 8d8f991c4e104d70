"""Seconds and peak memory of large inputs: many problems, many rollouts, many stages.

  python benchmarks/load.py                          # every part at full size, then the table
  python benchmarks/load.py --part jsonl --rows 50000

Each part runs in a process of its own, so that its peak memory is its own. README.md has the
method.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from headwater import api
from headwater.config.loading import validate_recipe
from headwater.config.recipe import Recipe
from headwater.stages.job import StageContext, StageJob
from headwater.types import Problem
from headwater.workflow.outcome import RunOutcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.run import WorkerFunctions, run_study

_WORDS = ("train", "leaf", "station", "apple", "basket", "mile", "hour", "price", "pencil", "book")
_ROWS_A_WRITE = 10_000


def problem_rows(count: int) -> Iterator[dict[str, str]]:
    """Problems of about 100 bytes, all different, from a seed."""
    rng = random.Random(0)
    for number in range(count):
        words = [rng.choice(_WORDS) for _ in range(4)]
        amounts = [rng.randint(1, 10**6) for _ in range(2)]
        yield {
            "problem": f"A {words[0]} has {amounts[0]} {words[1]}s and {amounts[1]} {words[2]}s; "
            f"how many are left of {number} in the {words[3]}?",
            "answer": str(rng.randint(0, 10**6)),
            "solution": f"There are {number}.",
        }


def write_problems(path: Path, count: int) -> None:
    """A problem file of `count` rows, in the format its suffix names."""
    if path.suffix == ".parquet":
        _write(path, problem_rows(count))
        return
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        for row in problem_rows(count):
            file.write(json.dumps(row) + "\n")


def recipe_of(train: str, held_out: str, labels: int, prompts: int, **changes: Any) -> Recipe:
    """A small study on a problem file."""
    plain: dict[str, Any] = {
        "name": "load",
        "task": {
            "train": train,
            "eval": {"held_out": held_out},
            "verifier": "math",
            "prompt": "boxed",
        },
        "models": {"teacher": {"source": "tiny:teacher"}, "student": {"source": "tiny:student"}},
        "pools": {"labels": labels, "prompts": prompts},
        "stages": {"grpo": {"steps": 1}},
        "arms": {
            "cold": {"student": ["grpo"]},
            "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]},
        },
        "diagnostics": {"prompts": 0},
        "compute": {"processes": 1},
    }
    return validate_recipe(plain | changes)


def many_arms(count: int) -> dict[str, Any]:
    """Arms of two stages of their own each: one that trains, and its evaluation."""
    return {f"arm_{n}": {"student": [{"grpo": {"lr": 1e-6 * (n + 1)}}]} for n in range(count)}


# --- a stage that does nothing but leave files ---------------------------------------------------


def run_stage(job: StageJob, context: StageContext) -> None:
    """Leave what a stage leaves: LOAD_ROLLOUTS rollouts of a GRPO stage, attempts of an
    evaluation."""
    (job.output_dir / "model").mkdir()
    (job.output_dir / "model" / "value.json").write_text("1")
    rollouts = int(os.environ.get("LOAD_ROLLOUTS", "0"))
    if job.kind == "evaluate":
        _write(job.output_dir / "attempts.parquet", _attempts(job))
    elif job.kind == "grpo":
        from headwater.stages.rollouts import ROLLOUT_SCHEMA  # torch, in the worker alone

        context.account.charge(updates=1, seconds=0.5)
        if rollouts:
            path = job.output_dir / "rollouts.parquet"
            _write(path, (_rollout(job, n) for n in range(rollouts)), ROLLOUT_SCHEMA)


def accept(*_: Any) -> None:
    """Models that can be bridged and read everything."""


def _attempts(job: StageJob) -> Iterator[dict[str, Any]]:
    rng = random.Random(job.fingerprint)
    for problem in job.problems:
        for attempt in range(job.config.attempts):  # type: ignore[attr-defined]
            yield {
                "problem_id": problem.id,
                "attempt": attempt,
                "verdict": rng.choice(("correct", "incorrect")),
                "answer": "1",
                "vote": 0,
                "response_tokens": 200,
                "truncated": False,
                "prompt": problem.prompt,
                "response": _response(rng),
                "level": None,
                "subject": None,
            }


def _rollout(job: StageJob, number: int) -> dict[str, Any]:
    rng = random.Random(number)
    problem: Problem = job.problems[number // 8 % len(job.problems)]
    verdict = rng.choice(("correct", "incorrect"))
    return {
        "stage": job.fingerprint,
        "step": number // 1024,
        "problem_id": problem.id,
        "sample": number % 8,
        "prompt": problem.prompt,
        "response": _response(rng),
        "verdict": verdict,
        "reward": float(verdict == "correct"),
        "response_tokens": 200,
        "finish_reason": "stop",
    }


def _response(rng: random.Random) -> str:
    """About 500 bytes."""
    return " ".join(rng.choice(_WORDS) for _ in range(80)) + r" \boxed{1}"


def _write(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    first = pa.Table.from_pylist(list(islice(rows, _ROWS_A_WRITE)), schema=schema)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        while chunk := list(islice(rows, _ROWS_A_WRITE)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=first.schema))


# --- the parts -----------------------------------------------------------------------------------


def plan_file(folder: Path, suffix: str, rows: int) -> str:
    """`headwater plan` on a file of problems, half of them prompts."""
    train, held_out = str(folder / f"train{suffix}"), str(folder / "held_out.jsonl")
    plan = api.plan(recipe_of(train, held_out, 1_000, rows // 2), folder / "none")
    return f"{len(plan.stages)} stages"


def run_file(folder: Path, rows: int) -> str:
    """A whole run on that file whose stages do nothing: what handing over problems takes."""
    train, held_out = str(folder.parent / "train.jsonl"), str(folder / "held_out.jsonl")
    recipe = recipe_of(train, held_out, 1_000, rows // 2)
    study = prepare_study(recipe)
    began = time.perf_counter()
    _run(folder, recipe)
    reading = sum(node.pool == "prompts" for node in study.graph.nodes.values())
    return (
        f"{reading} stages read {rows // 2:,} prompts; {time.perf_counter() - began:.1f} s in run"
    )


def plan_stages(folder: Path, stages: int) -> str:
    """`headwater plan` of many arms over ten seeds, two stages of its own an arm and seed."""
    recipe = _embedded(stages)
    return f"{len(api.plan(recipe, folder / 'none').stages):,} stages"


def run_stages(folder: Path, stages: int) -> str:
    """A run of as many stages that do nothing, one worker; its report's outcome is loaded."""
    outcome = _run(folder, _embedded(stages))
    return f"{len(outcome.stages):,} stages"


def rollouts_run(folder: Path, rollouts: int) -> str:
    """A run folder with that many rollouts of one stage and attempts of one evaluation."""
    os.environ["LOAD_ROLLOUTS"] = str(rollouts)
    write_problems(folder / "many.jsonl", rollouts // 8)
    recipe = recipe_of(
        str(folder / "held_out.jsonl"),
        str(folder / "many.jsonl"),
        20,
        20,
        arms={"cold": {"student": ["grpo"]}, "other": {"student": [{"grpo": {"lr": 1e-5}}]}},
        evaluation={"attempts": 8},
    )
    _run(folder, recipe)
    return f"two arms of {rollouts:,} rollouts and {rollouts:,} attempts each"


def report(folder: Path) -> str:
    """`headwater report` of that folder."""
    size = api.report(folder / "run").page_path.stat().st_size
    return f"a page of {size / 2**20:.1f} MiB"


def samples(folder: Path, stage: str | None) -> str:
    """`headwater samples` of that folder."""
    found = api.samples(folder / "run", stage=stage)
    return f"{sum(len(rollouts) for _, rollouts in found.groups)} shown"


def _embedded(stages: int) -> Recipe:
    task = "task:arithmetic?steps=3-4&count=60"
    held_out = "task:arithmetic?steps=3-4&count=5&seed=9"
    arms = many_arms(max(1, stages // 20))
    return recipe_of(task, held_out, 20, 20, arms=arms, seeds=tuple(range(10)))


def _run(folder: Path, recipe: Recipe) -> RunOutcome:
    study = prepare_study(recipe)
    functions = WorkerFunctions("load:run_stage", "load:accept", "load:accept")
    return run_study(study, folder / "run", view=ProgressView(study.graph), functions=functions)


# --- measuring -----------------------------------------------------------------------------------


def parts(folder: Path, rows: int, rollouts: int, stages: int) -> dict[str, Callable[[], str]]:
    """Every part by its name, in the order in which they can be run."""
    return {
        "plan .jsonl": lambda: plan_file(folder, ".jsonl", rows),
        "plan .jsonl.gz": lambda: plan_file(folder, ".jsonl.gz", rows),
        "plan .parquet": lambda: plan_file(folder, ".parquet", rows),
        "run .jsonl": lambda: run_file(folder / "file", rows),
        "plan stages": lambda: plan_stages(folder, stages),
        "run stages": lambda: run_stages(folder / "stages", stages),
        "make rollouts": lambda: rollouts_run(folder / "rollouts", rollouts),
        "report": lambda: report(folder / "rollouts"),  # of what "make rollouts" made
        "samples": lambda: samples(folder / "rollouts", None),
        "samples --stage grpo": lambda: samples(folder / "rollouts", "grpo"),
    }


def measure(name: str, what: Callable[[], str]) -> dict[str, Any]:
    """Run one part here: seconds of the clock and of the processor, and peak memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    said = what()
    return {
        "part": name,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": _peak_mib(),
        "said": said,
    }


def _peak_mib() -> int:
    """Largest resident set of this process; what its parent had before it is not in it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def main() -> None:
    """Run one part, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--stages", type=int, default=10_000)
    parser.add_argument(
        "--folder", type=Path, help="kept, problem files too; a temporary one by default"
    )
    parser.add_argument("--only", nargs="*", help="these parts")
    parser.add_argument("--part", help="run this part here and print its line")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        found = parts(folder, asked.rows, asked.rollouts, asked.stages)
        if asked.part is not None:
            print(json.dumps(measure(asked.part, found[asked.part])))
            return
        _prepare(folder, asked.rows)
        sizes = [f"--{name}={getattr(asked, name)}" for name in ("rows", "rollouts", "stages")]
        table = Table("part", "seconds", "of the processor", "peak MiB", "")
        for name in asked.only or found:
            line = subprocess.run(
                [sys.executable, __file__, "--part", name, f"--folder={folder}", *sizes],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            print(line.strip(), flush=True)
            values = json.loads(line.splitlines()[-1])
            table.add_row(name, *(str(value) for key, value in values.items() if key != "part"))
        Console().print(table)


def _prepare(folder: Path, rows: int) -> None:
    """The problem files of every part."""
    for place in (folder, folder / "file", folder / "stages", folder / "rollouts"):
        place.mkdir(parents=True, exist_ok=True)
        held_out = [{**row, "problem": f"Say: {row['problem']}"} for row in problem_rows(500)]
        lines = "".join(json.dumps(row) + "\n" for row in held_out)
        (place / "held_out.jsonl").write_text(lines)
    for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
        if not (folder / f"train{suffix}").is_file():
            write_problems(folder / f"train{suffix}", rows)


if __name__ == "__main__":
    main()
