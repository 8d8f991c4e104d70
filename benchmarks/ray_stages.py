"""What Ray adds to a stage: seconds from one stage's end to the next one's, with empty stages.

  python benchmarks/ray_stages.py                    # here, as Ray tasks, as two ranks each
  python benchmarks/ray_stages.py --stages 50 --address auto

Stages do nothing, one after another, so that what is measured is starting, publishing and the
ledger. README.md has the method.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from headwater.config.loading import validate_recipe
from headwater.stages.job import StageContext, StageJob
from headwater.workflow.executor import Executor
from headwater.workflow.messages import WorkerSetup
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.ray_executor import RayExecutor
from headwater.workflow.run import make_task
from headwater.workflow.store import ArtifactStore
from headwater.workflow.study import Study


def run_stage(job: StageJob, context: StageContext) -> None:
    """A stage that charges one update and writes one file."""
    context.account.charge(updates=1)
    if context.world.is_main:
        (job.output_dir / "model").mkdir(exist_ok=True)
        (job.output_dir / "model" / "empty").touch()


def study_of(stages: int) -> Study:
    """A study with so many stages that wait for nothing but their source."""
    arms = {f"arm_{n}": {"student": [{"grpo": {"lr": 1e-6 * (n + 1)}}]} for n in range(stages)}
    recipe = {
        "name": "empty",
        "task": {"train": "task:arithmetic?count=200", "eval": {"one": "task:arithmetic?seed=1"}},
        "models": {"student": {"source": "tiny:student"}},
        "pools": {"labels": 50},
        "arms": arms,
    }
    recipe["task"]["prompt"] = "bare"  # type: ignore[index]
    return prepare_study(validate_recipe(recipe))


def seconds(stages: int, ranks: int, address: str | None) -> tuple[float, float, float]:
    """(until stages can run, the first stage, each further one).

    address: of a Ray cluster; None for a worker process of this machine.
    """
    study = study_of(stages)
    graph = study.graph
    source = [f for f, node in graph.nodes.items() if node.kind == "source"]
    first, *others = [f for f, node in graph.nodes.items() if node.kind == "grpo"]
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(Path(folder))
        setup = WorkerSetup(store.run_dir, f"{Path(__file__).stem}:run_stage")
        task_of, view = partial(make_task, study, store), ProgressView(graph)
        compute = study.recipe.compute.model_copy(update={"ranks": ranks})
        executor: Executor | RayExecutor
        if address is None:
            executor = Executor(graph, setup, 1, task_of, view)
        else:
            executor = RayExecutor(graph, setup, 1, task_of, view, address, compute)
        began = time.perf_counter()
        with executor:
            starting = time.perf_counter() - began
            executor.run(source, ())
            alone = _timed(lambda: executor.run([first], ()))
            rest = _timed(lambda: executor.run(others, ()))
    return starting, alone, rest / len(others)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each way to run them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--stages", type=int, default=20, help="stages of one process each")
    parser.add_argument("--gangs", type=int, default=3, help="stages of two ranks each")
    parser.add_argument("--address", default="local", help="auto, local or HOST:PORT")
    given = parser.parse_args()
    ways: dict[str, tuple[int, int, str | None]] = {
        "worker process of this machine": (given.stages, 1, None),
        "Ray task": (given.stages, 1, given.address),
        "Ray Train, two ranks": (given.gangs, 2, given.address),
    }
    print("| stages as | until the first may start, s | the first, s | each further one, s |")
    print("| --- | --- | --- | --- |")
    for name, (stages, ranks, address) in ways.items():
        found = seconds(stages, ranks, address)
        print(f"| {name} | " + " | ".join(f"{one:.2f}" for one in found) + " |", flush=True)


if __name__ == "__main__":
    main()
