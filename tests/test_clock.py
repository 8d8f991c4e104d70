"""The clock on the wall may stand, leap or go back: nothing that is measured or saved notices."""

from __future__ import annotations

import ast
import itertools
import json
import re
import time
from pathlib import Path

import pytest

import headwater
import workflow_stages
from headwater.ledger import Ledger
from headwater.stages.job import StageContext, StageJob
from headwater.workflow.outcome import load_outcome
from headwater.workflow.progress import LineView, ProgressView
from headwater.workflow.run import WorkerFunctions, run_study
from test_recorded_data import make_world, study_of
from test_workflow_progress import console, graph_of, grpo, text
from test_workflow_run import FUNCTIONS, numbers

YEAR = 365 * 24 * 3600.0
#: What the clock says, call after call: a year back, then ahead, then back before 1970.
LEAPS = itertools.cycle([-YEAR, YEAR, 3 * YEAR, -60 * YEAR, 0.0])
TRUE_TIME = time.time


def leaping_time() -> float:
    """Seconds since 1970, as an unruly clock has them."""
    return TRUE_TIME() + next(LEAPS)


def run_stage(job: StageJob, context: StageContext) -> None:
    """A stage in a process whose clock leaps, from its first stage on."""
    time.time = leaping_time
    workflow_stages.run_stage(job, context)


def test_a_run_under_a_leaping_clock_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, leaping = make_world(tmp_path / "steady"), make_world(tmp_path / "leaping")
    study = study_of(steady)
    run_study(study, steady / "run", view=ProgressView(study.graph), functions=FUNCTIONS)
    functions = WorkerFunctions(
        "test_clock:run_stage", *("workflow_stages:" + name for name in ("same_tokenizer", "fits"))
    )
    monkeypatch.setattr(time, "time", leaping_time)
    out = console()
    run_study(study, leaping / "run", view=LineView(study.graph, out), functions=functions)
    assert numbers(leaping) == numbers(steady)
    for manifest in (leaping / "run" / "artifacts").glob("*/manifest.json"):
        assert 0.0 <= json.loads(manifest.read_text())["seconds"] < 600.0
    outcome = load_outcome(leaping / "run")
    assert all(0.0 <= stage.seconds < 600.0 for stage in outcome.stages)
    with Ledger(leaping / "run" / "ledger.sqlite") as ledger:
        assert 0.0 <= ledger.spending().seconds < 600.0
    assert re.search(r"-\d|\bnan\b", text(out)) is None


def test_time_left_is_never_negative() -> None:
    graph = graph_of([0])
    view = ProgressView(graph)
    view.started(grpo(graph))
    view.progressed(grpo(graph), {"step": 1, "total": 4})
    view.progressed(grpo(graph), {"step": 6, "total": 4})  # more steps than were announced
    stage = view.running[grpo(graph)]
    assert stage.seconds_left(stage.began + 10.0) == 0.0
    assert stage.seconds_left(stage.began) == 0.0
    view.progressed(grpo(graph), {"step": 2, "total": 4})
    assert stage.seconds_left(stage.began + 10.0) == 20.0


def test_no_module_asks_for_the_time_of_day() -> None:
    """Durations and deadlines are of `perf_counter` and `monotonic`, which only go forward."""
    found = []
    for path in sorted(Path(headwater.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"):
                    found.append(f"{path.name}:{node.lineno} {name}")
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                if [alias.name for alias in node.names] == ["timedelta"]:  # a duration
                    continue
                found.append(f"{path.name}:{node.lineno} from {node.module} import")
    assert found == []
