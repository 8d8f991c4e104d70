"""Alerts on their way: from a stage to the terminal, the results and the report; --strict."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headwater.cli.entry import main
from headwater.config.loading import validate_recipe
from headwater.config.recipe import Recipe
from headwater.errors import InputError, StageError
from headwater.report.outcome import results_of
from headwater.report.page import Reading, render_page
from headwater.report.results import read_results, write_results
from headwater.workflow.held_worker import HeldWorker
from headwater.workflow.launch import launch_worker
from headwater.workflow.messages import WorkerSetup
from headwater.workflow.outcome import RunOutcome, load_outcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.record import read_record, record_of, write_record
from headwater.workflow.run import run_study
from test_workflow_run import FUNCTIONS, RECIPE, numbers, ran
from workflow_stages import ALERT, RAISED

ONE_ARM: dict[str, Any] = {
    "arms": {"raw_bridge": {"teacher": [], "student": ["warmup", "opd"]}},
    "contrasts": [],
}


class _Heard(ProgressView):
    """A view that remembers its warnings."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.heard: list[tuple[str, str]] = []

    def warned(self, fingerprint: str, words: str) -> None:
        self.heard.append((self.graph.nodes[fingerprint].kind, words))


def _start(world: Path, *, strict: bool = False, **changes: Any) -> tuple[RunOutcome, _Heard]:
    study = prepare_study(validate_recipe(RECIPE | changes))
    view = _Heard(study.graph)
    run = run_study(study, world / "run", view=view, functions=FUNCTIONS, strict=strict)
    return run, view


def test_an_alert_is_said_kept_listed_and_shown(tmp_path: Path) -> None:
    (tmp_path / ALERT).write_text("opd")
    outcome, view = _start(tmp_path)
    assert view.heard == [("opd", RAISED.words)] * 2  # of two bridges
    results = results_of(load_outcome(tmp_path / "run"))  # from the folder alone
    assert [(a.guard, a.step, a.words) for a in results.alerts] == [
        ("kl_rise_nats", 2, RAISED.words)
    ] * 2
    kinds = {stage.fingerprint: stage.kind for stage in results.stages}
    assert {kinds[alert.stage] for alert in results.alerts} == {"opd"}
    assert read_results(write_results(results, tmp_path).parent).alerts == results.alerts
    page = render_page(results, Reading(curves=[], samples=[]))
    assert "2 alarms while training" in page
    assert "Likely causes: a &lt;cause&gt;. Try: a cure." in page and "<cause>" not in page
    assert results_of(outcome) == results


def test_strict_ends_the_run_and_without_it_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / ALERT).write_text("warmup")
    with pytest.raises(StageError, match="run without --strict") as caught:
        _start(tmp_path, strict=True, **ONE_ARM)
    assert caught.value.exit_code == 1
    before = ran(tmp_path)
    outcome, _ = _start(tmp_path, **ONE_ARM)
    again = ran(tmp_path)[len(before) :]
    assert not {"source", "pretrain"} & {outcome.record.graph.nodes[f].kind for f in again}
    straight = tmp_path / "straight"
    straight.mkdir()
    _start(straight, **ONE_ARM)
    assert numbers(tmp_path) == numbers(straight)
    with pytest.raises(StageError, match=r"warmup on prompts .*finished with an alert.*--strict"):
        _start(tmp_path, strict=True, **ONE_ARM)


def test_strict_refuses_what_the_plan_warns_of_before_training(tmp_path: Path) -> None:
    study = replace(prepare_study(validate_recipe(RECIPE)), warnings=("3 problems resemble",))
    view = ProgressView(study.graph)
    with pytest.raises(InputError, match="3 problems resemble; --strict takes this for an error"):
        run_study(study, tmp_path / "run", view=view, functions=FUNCTIONS, strict=True)
    assert not (tmp_path / "run").exists()


def test_the_command_line_is_strict_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "a farmer had {} cows and sold some of them to a neighbour who lives across the river"
    for name, numbers_ in (("train", range(12)), ("eval", (20, 21))):
        rows = [{"problem": story.format(n) + "?", "answer": str(n)} for n in numbers_]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    recipe = RECIPE | {
        "task": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": {"held_out": str(tmp_path / "eval.jsonl")},
            "verifier": "exact",
            "prompt": "boxed",
        },
        "models": {"student": {"source": "tiny:student"}},
        "pools": {"labels": 6},
        "arms": {"cold": {"student": ["grpo"]}},
        "contrasts": [],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as caught:
        main(["run", str(path), "--strict", "--deterministic", "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "resemble evaluation problems" in (said := capsys.readouterr().err)
    assert "--strict takes this for an error" in said


def test_guards_and_determinism_are_in_no_fingerprint() -> None:
    plain = prepare_study(validate_recipe(RECIPE)).graph
    changed = RECIPE | {
        "guards": {"truncation_rate": None, "window_steps": 3},
        "compute": {"deterministic": True},
    }
    assert prepare_study(validate_recipe(changed)).graph.nodes == plain.nodes


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"truncation": 0.5}, "guards.truncation: unknown key; did you mean 'truncation_rate'"),
        ({"truncation_rate": 1.5}, "guards.truncation_rate = 1.5: input should be less than or"),
        ({"length_ratio": 1.0}, "guards.length_ratio = 1.0: input should be greater than 1"),
        ({"window_steps": None}, "guards.window_steps = None"),
    ],
)
def test_guards_that_cannot_be_are_refused(guards: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_recipe(RECIPE | {"guards": guards})
    assert message in str(caught.value)


def test_every_guard_can_be_switched_off_and_is_in_the_schema() -> None:
    described = Recipe.model_json_schema()["$defs"]["Guards"]["properties"]
    thresholds = [name for name in described if not name.endswith("_steps")]
    assert len(thresholds) == 8
    off = dict.fromkeys(thresholds)
    assert validate_recipe(RECIPE | {"guards": off}).guards.model_dump(include=set(off)) == off


def _environment(pid: int) -> list[bytes]:
    """What a process was started with; nothing can be read while the kernel still sets it up."""
    for _ in range(100):
        if told := Path(f"/proc/{pid}/environ").read_bytes():
            return told.split(b"\0")
        time.sleep(0.05)
    raise AssertionError(f"process {pid} has no environment after five seconds")


def test_determinism_is_recorded_and_reaches_the_workers(tmp_path: Path) -> None:
    for wanted in (False, True):
        study = prepare_study(validate_recipe(RECIPE | {"compute": {"deterministic": wanted}}))
        write_record(record_of(study, threads=1), tmp_path)
        assert read_record(tmp_path).machine["deterministic"] is wanted
        setup = WorkerSetup(tmp_path, FUNCTIONS.run_stage, deterministic=wanted)
        worker = HeldWorker(setup, launch_worker)
        assert (b"CUBLAS_WORKSPACE_CONFIG=:4096:8" in _environment(worker._process.pid)) is wanted
        worker.quit()
        worker.end(5.0)
