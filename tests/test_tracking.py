"""Trackers: every step once and exactly, whatever befalls run and tracker; nothing unasked."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from headwater import api
from headwater.cli.entry import main
from headwater.config.loading import validate_recipe
from headwater.errors import InputError
from headwater.tracking import backends
from headwater.tracking.completions import read_completions
from headwater.tracking.names import PEER_NAMES, NamedRows
from headwater.tracking.stage_files import stage_file
from headwater.tracking.view import tracked, tracked_run
from headwater.workflow.callbacks import with_callbacks
from headwater.workflow.outcome import RunOutcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.run import WorkerFunctions, run_study
from test_workflow_run import RECIPE
from tracked_stages import KILL_RUN, STEPS, loss

TOKEN = "n0t-a-real-t0ken-f0r-tests-0123456789abcdef"
FUNCTIONS = WorkerFunctions(
    "tracked_stages:run_stage", "workflow_stages:same_tokenizer", "workflow_stages:fits"
)
MAIN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tracking import start
start(Path(sys.argv[1]))
"""
# Needed by every test that opens a tracker.
accelerate = pytest.mark.skipif(
    backends.find_spec("accelerate") is None or backends.find_spec("tensorboard") is None,
    reason="needs accelerate and tensorboard: the extra track",
)


class Said(ProgressView):
    """A display that remembers what it was told to say."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def start(world: Path, **changes: Any) -> tuple[RunOutcome, list[str]]:
    """Run the arm `cold` in WORLD/run; returns what came of it and what was said."""
    recipe = RECIPE | {"report_to": ["tensorboard"], "compute": {"processes": 1}} | changes
    study = prepare_study(validate_recipe(recipe), arms=["cold"])
    view = Said(study.graph)
    return run_study(study, world / "run", view=view, functions=FUNCTIONS), view.lines


def events(world: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(step, value) pairs as TensorBoard has them, by run and tag."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    root = world / "run" / "trackers" / "tensorboard"
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(root.rglob("events.*")):
        tags = found.setdefault(str(path.parent.relative_to(root)), {})
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    pair = (event.step, value.tensor.float_val[0])
                    tags.setdefault(value.tag, []).append(pair)
    return found


def grpo_run(found: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The tags of the one run that is of GRPO."""
    (name,) = [name for name in found if "/grpo-labels/seed0/" in name]
    assert name.startswith("cold/")
    return found[name]


LOSSES = [(step + 1, pytest.approx(loss(step))) for step in range(STEPS)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunOutcome]:
    """A run that nothing disturbed, and what came of it."""
    world = tmp_path_factory.mktemp("told")
    return world, start(world)[0]


@accelerate
def test_a_run_for_each_stage_has_each_step_under_the_peers_names(
    told: tuple[Path, RunOutcome],
) -> None:
    found = events(told[0])
    grpo = grpo_run(found)
    assert grpo["loss"] == LOSSES
    assert grpo["headwater/kl"] == [(1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5)]
    assert grpo["num_tokens"] == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert [step for step, _ in grpo["step_time"]] == [1, 2, 3, 4]
    kinds = {name.split("/")[1].split("-")[0] for name in found}
    assert kinds == {"grpo", "pretrain", "results"}  # no source, no evaluation


@accelerate
def test_results_are_told_with_standard_errors(told: tuple[Path, RunOutcome]) -> None:
    world, outcome = told
    (row,) = [row for row in outcome.rows if row.arm == "cold"]
    correct_QA = row.table.correct[0]
    tags = events(world)["cold/results-student"]
    assert tags["eval/held_out/avg_at_2"] == [(0, pytest.approx(correct_QA.mean()))]
    assert tags["eval/held_out/pass_at_2"] == [(0, pytest.approx(correct_QA.any(axis=1).mean()))]
    error = correct_QA.mean(axis=1).std(ddof=1) / len(correct_QA) ** 0.5
    assert tags["eval/held_out/avg_at_2_stderr"] == [(0, pytest.approx(error))]


@accelerate
def test_the_same_command_again_tells_nothing_twice(told: tuple[Path, RunOutcome]) -> None:
    before = events(told[0])
    start(told[0])
    assert events(told[0]) == before


@pytest.mark.slow
@accelerate
def test_a_run_killed_after_its_checkpoint_goes_on_with_each_step_once(tmp_path: Path) -> None:
    (tmp_path / KILL_RUN).write_text("grpo")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(
        [sys.executable, "-c", MAIN, tmp_path], env=environment, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert grpo_run(events(tmp_path))["loss"] == LOSSES  # steps 3 and 4 are after the checkpoint
    start(tmp_path)
    grpo = grpo_run(events(tmp_path))
    assert grpo["loss"] == LOSSES
    assert grpo["num_tokens"] == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]


@accelerate
def test_a_tracker_that_fails_ends_no_run_and_is_told_the_rest_later(tmp_path: Path) -> None:
    blocked = tmp_path / "run" / "trackers" / "tensorboard"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    outcome, said = start(tmp_path)
    assert [row.arm for row in outcome.rows][:1] == ["cold"]
    (warning,) = [line for line in said if "tensorboard failed" in line]
    assert "the same command again sends what is missing" in warning
    blocked.unlink()
    start(tmp_path)
    assert grpo_run(events(tmp_path))["loss"] == LOSSES


def test_nothing_is_told_where_no_tracker_is_named(tmp_path: Path) -> None:
    recipe = validate_recipe(RECIPE)
    assert recipe.report_to == ()
    view = ProgressView(prepare_study(recipe).graph)
    assert tracked(view, recipe, tmp_path) is view
    assert list(tmp_path.iterdir()) == []


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline run: 7 bytes of header, then blocks of 32 KiB as LevelDB logs them."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if left < 7 or kind == 0:
            at += left
            continue
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
@accelerate
def test_wandb_offline_has_steps_tables_and_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    start(tmp_path, report_to=["wandb"], log_completions=2)
    folder = tmp_path / "run" / "trackers" / "wandb"
    runs = {}
    for path in folder.glob("offline-run-*/*.wandb"):
        records = list(wandb_records(path))
        (run,) = [record.run for record in records if record.HasField("run")]
        history = [record.history for record in records if record.HasField("history")]
        runs[run.display_name] = (run, history, path.parent)
    (name,) = [name for name in runs if "/grpo-labels/" in name]
    run, history, place = runs[name]
    assert (run.run_group, run.job_type, "cold" in run.tags) == ("small", "grpo", True)
    losses = [
        (row.step.num, json.loads(item.value_json))
        for row in history
        for item in row.item
        if "/".join(item.nested_key) == "loss"
    ]
    assert losses == LOSSES
    tables = [json.loads(path.read_text()) for path in place.glob("files/media/table/*.json")]
    columns = ["step", "prompt", "completion", "reward", "advantage"]
    assert [table["columns"] for table in tables] == [columns] * len(tables)
    rows = sorted(row for table in tables for row in table["data"])  # one, or as the stage saved
    assert [row[0] for row in rows] == [2, 2, 4, 4]
    assert rows[1] == [2, "1+1=", "grpo 1 1", 1.0, 1.0]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wanbd", r"report_to: 'wanbd' is no tracker; expected any of .*; did you mean 'wandb'\?"),
        (["tensorboard", "neptune"], r"'neptune' is no tracker; .*; name one of these, or none"),
        ({"wandb": True}, "report_to"),
    ],
)
def test_an_unknown_tracker_is_refused_when_the_recipe_is_read(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        validate_recipe(RECIPE | {"report_to": value})


def test_one_name_may_stand_alone_and_none_is_none() -> None:
    names = [validate_recipe(RECIPE | {"report_to": v}).report_to for v in ("mlflow", "none", [])]
    assert names == [("mlflow",), (), ()]


def test_a_missing_package_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio: the package accelerate is not .*\[track\]"):
        start(tmp_path, report_to=["trackio"])
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("accelerate")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(InputError, match=r"no login was found; .* WANDB_MODE=offline"):
        backends.require_trackers(["wandb"])
    netrc.write_text(f"machine api.wandb.ai login user password {TOKEN}\n")
    netrc.chmod(0o600)
    backends.require_trackers(["wandb"])


@accelerate
def test_a_link_among_the_trackers_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="trackers is a link"):
        start(tmp_path)


def test_names_are_the_peers_or_say_whose_they_are() -> None:
    rows = NamedRows()
    first = {"step": 0.0, "seconds": 2.0, "response_tokens": 7.0, "pass_rate": 0.5}
    assert rows.named(first) == (
        1,
        {"completions/mean_length": 7.0, "headwater/pass_rate": 0.5, "step_time": 2.0},
    )
    assert rows.named({"step": 1.0, "seconds": 2.5}) == (2, {"step_time": 0.5})


def test_every_name_is_in_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "trackers.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    names = {ours.strip(" `"): theirs.strip(" `") for ours, theirs in rows}
    assert names.items() >= PEER_NAMES.items()


def test_a_stage_that_many_arms_share_names_some() -> None:
    graph = prepare_study(validate_recipe(RECIPE)).graph
    (shared,) = [f for f, node in graph.nodes.items() if node.kind == "pretrain"]
    run = tracked_run(graph, "small", shared)
    assert run.name == f"cold+raw_bridge+2/pretrain-student/seed0/{shared[:8]}"
    assert set(run.tags) == {"cold", "raw_bridge", "bridge", "half", "pretrain", "student", "seed0"}
    assert run.config["steps"] == 3


def test_a_stage_in_hand_is_found_where_its_latest_attempt_writes(tmp_path: Path) -> None:
    for place, when in (("checkpoints/f.1", 1), ("checkpoints/f.2", 2), ("staging/f", 0)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "metrics.jsonl").write_text("")
        os.utime(tmp_path / place / "metrics.jsonl", (when, when))
    found = stage_file(tmp_path, "f", "metrics.jsonl")
    assert found == tmp_path / "checkpoints" / "f.2" / "metrics.jsonl"
    (tmp_path / "artifacts" / "f").mkdir(parents=True)
    published = tmp_path / "artifacts" / "f" / "metrics.jsonl"
    published.write_text("")
    assert stage_file(tmp_path, "f", "metrics.jsonl") == published
    assert stage_file(tmp_path, "g", "metrics.jsonl") is None


# --- completions ---------------------------------------------------------------------------------


def test_completions_of_a_file_from_before_advantages_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"
    row = {"step": 1, "prompt": "p", "response": "r", "reward": 1.0}
    parquet.write_table(pa.Table.from_pylist([row | {"step": 0}, row]), path)
    (completion,) = read_completions([path], lambda step: step == 2)[2]
    assert completion.row() == {
        "step": 2,
        "prompt": "p",
        "completion": "r",
        "reward": 1.0,
        "advantage": None,
    }


@accelerate
def test_the_terminal_shows_a_step_as_a_table(
    told: tuple[Path, RunOutcome], capsys: pytest.CaptureFixture[str]
) -> None:
    run = told[0] / "run"
    (table,) = api.completions(run, stage="grpo").tables
    assert (table.step, [one.advantage for one in table.completions]) == (4, [-1.0, 1.0])
    (table,) = api.completions(run, stage="grpo", step=2, count=1).tables
    assert [one.completion for one in table.completions] == ["grpo 1 0"]
    with pytest.raises(InputError, match=r"no completions in .* step=9; expected"):
        api.completions(run, step=9)
    with pytest.raises(SystemExit):
        main(["samples", str(run), "--table", "--arm", "cold", "--stage", "grpo"])
    shown = capsys.readouterr().out
    assert "grpo 3 1" in shown and "1.00" in shown and "advantage" in shown
    with pytest.raises(SystemExit):
        main(["samples", str(run), "--step", "2"])
    assert "--step 2 without --table" in capsys.readouterr().err


def test_callbacks_beside_trackers_are_told_every_step_and_can_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.tracking.view.require_trackers", lambda names: None)
    recipe = validate_recipe(RECIPE | {"report_to": ["tensorboard"]})
    graph = prepare_study(recipe, arms=["cold"]).graph
    asked = with_callbacks(Said(graph), [lambda event: True])
    view = tracked(asked, recipe, tmp_path)
    assert view.every_step and not view.stop_requested
    stage = next(name for name, node in graph.nodes.items() if node.kind == "source")
    view.started(stage)
    assert view.stop_requested
    assert not tracked(Said(graph), recipe, tmp_path).every_step
