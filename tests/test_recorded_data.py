"""A run folder and the data it was made of: what may change between two runs, and what may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.config.loading import validate_recipe
from headwater.errors import InputError
from headwater.storage import SEAL
from headwater.workflow.outcome import RunOutcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.record import read_record
from headwater.workflow.run import run_study
from headwater.workflow.study import Study
from test_workflow_run import FUNCTIONS, RECIPE, numbers, ran

TRAIN, HELD_OUT = 30, 4


def write_problems(path: Path, count: int, first: int = 0) -> None:
    rows = (
        {"problem": f"What is {number} plus {number}?", "answer": str(2 * number)}
        for number in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def study_of(world: Path, **changes: Any) -> Study:
    task = {
        "train": str(world / "train.jsonl"),
        "eval": {"held_out": str(world / "held.jsonl")},
        "verifier": "exact",
        "prompt": "boxed",
    }
    models = {"teacher": {"source": "tiny:teacher"}, "student": {"source": "tiny:student"}}
    arms = {"cold": {"student": ["grpo"]}}
    pools = {"labels": 10, "prompts": 10}
    own = {"task": task, "models": models, "arms": arms, "pools": pools, "contrasts": []}
    changes = {"task": task | changes.pop("task", {})} | changes
    return prepare_study(validate_recipe(RECIPE | own | changes))


def run(world: Path, **changes: Any) -> RunOutcome:
    return run_prepared(world, study_of(world, **changes))


def run_prepared(world: Path, study: Study) -> RunOutcome:
    return run_study(study, world / "run", view=ProgressView(study.graph), functions=FUNCTIONS)


def make_world(world: Path) -> Path:
    world.mkdir(exist_ok=True)
    write_problems(world / "train.jsonl", TRAIN)
    write_problems(world / "held.jsonl", HELD_OUT, first=1_000)
    return world


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


def test_the_record_says_what_data_a_run_was_made_of(world: Path) -> None:
    run(world)
    found = {facts["key"]: facts for facts in read_record(world / "run").data}
    assert set(found) == {"task.train", "task.eval.held_out"}
    train = found["task.train"]
    assert (train["rows"], train["source"]) == (TRAIN, str(world / "train.jsonl"))
    assert train["bytes"] == (world / "train.jsonl").stat().st_size
    assert {len(facts["sha256"]) for facts in found.values()} == {64}
    assert train["sha256"] != found["task.eval.held_out"]["sha256"]


@pytest.mark.parametrize(
    ("name", "key", "rows"), [("train", "task.train", TRAIN), ("held", "task.eval", HELD_OUT)]
)
def test_other_content_under_the_same_name_is_refused_before_anything_is_written(
    world: Path, name: str, key: str, rows: int
) -> None:
    run(world)
    before = {p: p.read_bytes() for p in (world / "run").rglob("*.*") if p.suffix != ".lock"}
    path = world / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"problem": "What is 7 plus 8?", "answer": "15"}) + "\n")
    with pytest.raises(InputError) as refused:
        run(world, arms={"cold": {"student": ["grpo"]}, "other": {"teacher": ["grpo"]}})
    message = str(refused.value)
    assert key in message and str(path) in message
    assert f"had {rows:,} rows" in message and f"now has {rows + 1:,} rows" in message
    assert "restore" in message and "--out another folder" in message
    after = {p: p.read_bytes() for p in (world / "run").rglob("*.*") if p.suffix != ".lock"}
    assert after == before
    write_problems(path, rows, first=1_000 if name == "held" else 0)
    assert run(world).rows  # restored: as if nothing had been


def test_an_answer_that_changed_is_refused_though_no_size_did(world: Path) -> None:
    run(world)
    path = world / "train.jsonl"
    path.write_text(path.read_text().replace('"answer": "18"', '"answer": "19"'))
    with pytest.raises(InputError, match=r"task\.train.*had 30 rows.*now has 30 rows"):
        run(world)


def test_what_does_not_change_a_source_is_accepted(world: Path) -> None:
    run(world)
    write_problems(world / "more.jsonl", 3, first=5_000)
    both = {"held_out": str(world / "held.jsonl"), "more": str(world / "more.jsonl")}
    outcome = run(world, task={"eval": both}, pools={"labels": 12, "prompts": 8})
    assert {row.eval_set for row in outcome.rows} == {"held_out", "more"}
    run(world)  # without the set that came later: what it was is kept
    write_problems(world / "more.jsonl", 4, first=5_000)
    with pytest.raises(InputError, match=r"task\.eval\.more.*had 3 rows.*now has 4 rows"):
        run(world, task={"eval": both})
    write_problems(world / "other.jsonl", 40)
    assert run(world, task={"train": str(world / "other.jsonl")}).rows  # another source


def test_the_same_file_read_otherwise_is_not_called_changed(world: Path) -> None:
    run(world)
    columns = {"problem": "problem", "answer": "answer", "subject": "answer"}
    assert run(world, task={"columns": columns}).rows


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_whose_record_says_nothing_of_data_is_continued(
    world: Path, text: str | None
) -> None:
    run(world)
    record = world / "run" / "run.json"
    plain = json.loads(record.read_text())
    del plain["data"], plain[SEAL]
    record.write_text(json.dumps(plain) if text is None else text)
    (world / "train.jsonl").write_text((world / "train.jsonl").read_text() + "\n")
    if text is None:
        assert read_record(world / "run").data == ()
    before = ran(world)
    run(world)
    assert ran(world) == before
    assert len(read_record(world / "run").data) == 2


def test_a_file_that_changes_after_it_was_read_changes_nothing(world: Path, tmp_path: Path) -> None:
    """Stages are handed their problems; none opens a problem file."""
    undisturbed = make_world(tmp_path / "undisturbed")
    run(undisturbed)
    study = study_of(world)
    write_problems(world / "train.jsonl", 3, first=90_000)
    (world / "held.jsonl").unlink()
    run_prepared(world, study)
    assert numbers(world) == numbers(undisturbed)
