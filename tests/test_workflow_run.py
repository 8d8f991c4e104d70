"""Whole runs with small real stages: sharing, resume after kills and Ctrl-C, damage, budgets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from headwater.config.loading import load_recipe, validate_recipe
from headwater.errors import InputError, StageError
from headwater.ledger import Ledger
from headwater.workflow.outcome import RunOutcome, load_outcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.readings import readings_of
from headwater.workflow.record import read_record, record_of, write_record
from headwater.workflow.run import WorkerFunctions, run_study
from workflow_stages import CRASH, DEAF, FAIL, KILL, STALL

FUNCTIONS = WorkerFunctions(
    "workflow_stages:run_stage", "workflow_stages:same_tokenizer", "workflow_stages:fits"
)
RECIPE: dict[str, Any] = {
    "name": "small",
    "task": {
        "train": "task:arithmetic?steps=3-4&count=60",
        "eval": {"held_out": "task:arithmetic?steps=3-4&count=5&seed=9"},
        "verifier": "exact",
        "prompt": "bare",
    },
    "models": {
        "teacher": {"source": "tiny:teacher"},
        "student": {"source": "tiny:student", "prepare": [{"pretrain": {"steps": 3}}]},
    },
    "pools": {"labels": 20, "prompts": 20},
    "stages": {"grpo": {"steps": 4}, "opd": {"steps": 4}, "warmup": {"steps": 4}},
    "arms": {
        "cold": {"student": ["grpo"], "title": "cold GRPO"},
        "raw_bridge": {"teacher": [], "student": ["warmup", "opd"]},
        "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]},
        "half": {"teacher": ["grpo"], "student": ["warmup", "opd", {"grpo": "2H"}]},
    },
    "contrasts": [{"better": "bridge", "than": "cold", "differs_in": ["teacher", "transfer"]}],
    "diagnostics": {"prompts": 0},
    "evaluation": {"attempts": 2},
    "compute": {"processes": 2},
}
# The same run in a process of its own, for signals.
MAIN = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from headwater.errors import HeadwaterError
from test_workflow_run import start
try:
    start(Path(sys.argv[1]))
except HeadwaterError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(world: Path, *, functions: WorkerFunctions = FUNCTIONS, **changes: Any) -> RunOutcome:
    study = prepare_study(validate_recipe(RECIPE | changes))
    return run_study(study, world / "run", view=ProgressView(study.graph), functions=functions)


def numbers(world: Path) -> dict[str, str]:
    """Everything published that a number depends on, and the ledger's logical account."""
    root = world / "run" / "artifacts"
    files = [*root.glob("*/model/value.json"), *root.glob("*/attempts.parquet")]
    found = {str(f.relative_to(root)): f.read_bytes().hex() for f in sorted(files)}
    with Ledger(world / "run" / "ledger.sqlite") as ledger:
        return found | {"spent": str(ledger.spending()), "eval": str(ledger.spending(kind="eval"))}


def ran(world: Path, kind: str | None = None) -> list[str]:
    rows = [line.split() for line in (world / "ran.txt").read_text().splitlines()]
    return [row[1] for row in rows if kind in (None, row[0])]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    world = tmp_path_factory.mktemp("straight")
    start(world)
    return world


def test_each_distinct_stage_runs_once_and_parents_come_first(straight: Path) -> None:
    graph = load_outcome(straight / "run").record.graph
    order = ran(straight)
    assert sorted(order) == sorted(graph.nodes)
    place = {fingerprint: index for index, fingerprint in enumerate(order)}
    for node in graph.nodes.values():
        assert all(place[parent] < place[node.fingerprint] for parent in node.parents)


def test_a_finished_run_runs_nothing_again(straight: Path) -> None:
    before = ran(straight)
    start(straight)
    assert ran(straight) == before


def test_an_outcome_has_a_row_for_each_arm_its_teacher_and_the_base(straight: Path) -> None:
    outcome = load_outcome(straight / "run")
    assert [(row.arm, row.title, row.evaluates) for row in outcome.rows] == [
        ("cold", "cold GRPO", "student"),
        ("raw_bridge", "raw_bridge", "student"),
        ("bridge", "bridge", "student"),
        ("half", "half", "student"),
        ("bridge", "bridge: its teacher", "teacher"),
        ("base_teacher", "base teacher", "teacher"),
    ]
    half = outcome.rows[3]
    assert half.chain == (
        "teacher: grpo(labels)",
        "student: warmup(prompts)",
        "student: opd(prompts)",
        "student: grpo(2H)",
    )
    assert half.table.verdicts.shape == (1, 5, 2)
    assert set(half.table.response_tokens.flat) <= {3, 4}
    assert outcome.warnings == ()
    assert [(c.better, c.than, c.differs_in) for c in outcome.record.contrasts] == [
        ("bridge", "cold", ("teacher", "transfer"))
    ]


def test_attempts_come_back_in_their_places(straight: Path) -> None:
    outcome = load_outcome(straight / "run")
    row = outcome.rows[0]
    path = straight / "run" / "artifacts" / row.evaluations[0] / "attempts.parquet"
    for found in parquet.read_table(path).to_pylist():
        place = row.table.problem_ids.index(found["problem_id"])
        assert row.table.verdicts[0, place, found["attempt"]] == found["verdict"]


def test_an_arm_is_charged_what_it_shares_and_the_run_once(straight: Path) -> None:
    outcome = load_outcome(straight / "run")
    spent = {row.title: row.spent for row in outcome.rows}
    # Updates of an arm: student's pretrain 3; teacher rl 4, rollouts 2, warmup 4, opd 4, rl 4.
    assert spent["cold GRPO"]["updates"] == 2 * 0 + 3 + 4
    assert spent["bridge"]["updates"] == 3 + 4 + 2 + 4 + 4
    assert spent["half"]["updates"] == spent["bridge"]["updates"] + 4
    assert spent["raw_bridge"]["labels"] == 0
    after = {row.title: row.spent_after_bases["updates"] for row in outcome.rows}
    assert after == {title: max(0, counts["updates"] - 3) for title, counts in spent.items()} | {
        "bridge: its teacher": 4
    }
    assert spent["bridge"]["verifier_calls"] == 4
    assert outcome.training["verifier_calls"] == 3 * 4
    assert outcome.evaluation["verifier_calls"] == 6 * 10
    assert outcome.physical["updates"] == outcome.training["updates"]


def test_the_number_of_processes_shows_in_no_number(straight: Path, tmp_path: Path) -> None:
    start(tmp_path, compute={"processes": 1})
    assert numbers(tmp_path) == numbers(straight)


def test_a_killed_worker_is_named_and_the_run_continues(straight: Path, tmp_path: Path) -> None:
    (tmp_path / KILL).write_text("opd")
    with pytest.raises(StageError, match=r"opd on prompts \(.*killed by SIGKILL.*run again"):
        start(tmp_path)
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)
    assert load_outcome(tmp_path / "run").physical["updates"] > 30


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (FAIL, InputError, "value=3 found; expected 4; set it to 4"),
        (CRASH, StageError, r"warmup on prompts \(.*\) failed: KeyError: 'missing'"),
    ],
)
def test_errors_arrive_as_they_were_raised(
    tmp_path: Path, order: str, error: type[Exception], message: str
) -> None:
    (tmp_path / order).write_text("warmup")
    with pytest.raises(error, match=message) as caught:
        start(tmp_path)
    assert type(caught.value) is error


def test_ctrl_c_saves_and_the_same_command_continues(straight: Path, tmp_path: Path) -> None:
    (tmp_path / STALL).write_text("grpo")
    run = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / f"{STALL}.done")
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "run the same command again to continue" in said
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)


def test_a_second_ctrl_c_does_not_wait(straight: Path, tmp_path: Path) -> None:
    (tmp_path / DEAF).write_text("grpo")
    run = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / f"{DEAF}.done")
    run.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=1)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=10)
    assert run.returncode == 130
    assert "stopped at once" in said
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)


def test_workers_die_with_a_run_that_is_killed(straight: Path, tmp_path: Path) -> None:
    (tmp_path / STALL).write_text("grpo")
    run = subprocess.Popen([sys.executable, "-c", MAIN, str(tmp_path)])
    wait_for(tmp_path / f"{STALL}.done")
    with pytest.raises(InputError, match=f"in use by process {run.pid}"):
        start(tmp_path)
    run.kill()
    run.wait()
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_a_damaged_artifact_is_rebuilt_alone(straight: Path, tmp_path: Path) -> None:
    start(tmp_path)
    graph = load_outcome(tmp_path / "run").record.graph
    teacher = next(plan.teacher for plan in graph.arms if plan.arm == "bridge")
    assert teacher is not None
    value = tmp_path / "run" / "artifacts" / teacher / "model" / "value.json"
    value.write_text(value.read_text().replace("a", "b"))
    before = ran(tmp_path)
    start(tmp_path)
    assert ran(tmp_path)[len(before) :] == [teacher]
    assert numbers(tmp_path) == numbers(straight)


def test_a_budget_stops_training_at_the_number_and_evaluates_the_rest(tmp_path: Path) -> None:
    outcome = start(tmp_path, budget={"verifier_calls": 9}, compute={"processes": 1})
    assert outcome.stopped is not None
    assert outcome.stopped.exit_code == 3
    assert outcome.training["verifier_calls"] == 9
    titles = [row.title for row in outcome.rows]
    assert "base teacher" in titles
    assert len(outcome.warnings) == 6 - len(titles)
    published = {stage.fingerprint for stage in outcome.stages}
    graph = outcome.record.graph
    assert all(
        node.fingerprint in published
        for node in graph.nodes.values()
        if node.kind == "evaluate" and node.model in published
    )
    more = start(tmp_path, budget={"verifier_calls": 12}, compute={"processes": 1})
    assert more.stopped is None
    assert len(more.rows) == 6


def test_stages_of_an_earlier_recipe_count_in_no_total_and_no_budget(tmp_path: Path) -> None:
    arms = {"cold": {"student": ["grpo"]}}
    start(tmp_path, arms=arms, contrasts=[], seeds=[5])
    budget = {"verifier_calls": 4, "updates": 7}
    outcome = start(tmp_path, arms=arms, contrasts=[], budget=budget)
    assert outcome.stopped is None
    assert (outcome.training["verifier_calls"], outcome.training["updates"]) == (4, 7)
    assert outcome.physical["updates"] == 7
    assert outcome.evaluation["verifier_calls"] == 10
    assert outcome.warnings == ()


def test_a_lost_ledger_is_a_warning_in_the_report_and_made_again_by_a_run(tmp_path: Path) -> None:
    arms = {"cold": {"student": ["grpo"]}}
    start(tmp_path, arms=arms, contrasts=[])
    before = numbers(tmp_path)
    (tmp_path / "run" / "ledger.sqlite").unlink()
    for _ in range(2):  # the first reading makes an empty one
        (warning,) = load_outcome(tmp_path / "run").warnings
        assert warning.startswith("the ledger has no account of 4 finished stages (first: source")
    assert "restore ledger.sqlite" in warning
    assert start(tmp_path, arms=arms, contrasts=[]).warnings == ()
    assert numbers(tmp_path) == before


def test_another_seed_makes_another_world_in_the_same_folder(tmp_path: Path) -> None:
    arms = {"cold": {"student": ["grpo"]}, "base": {"student": []}}
    outcome = start(tmp_path, arms=arms, contrasts=[], seeds=[0, 1])
    cold = outcome.rows[0]
    assert cold.table.seeds == (0, 1)
    assert cold.table.verdicts.shape == (2, 5, 2)
    assert len(cold.evaluations) == 2
    assert cold.spent["updates"] == 7  # of one seed, on average


def test_tokenizers_are_compared_before_anything_is_trained(tmp_path: Path) -> None:
    study = prepare_study(validate_recipe(RECIPE))
    functions = replace(FUNCTIONS, check_tokenizers="workflow_stages:other_tokenizer")
    with pytest.raises(InputError, match="differ; use one tokenizer"):
        run_study(study, tmp_path / "run", view=ProgressView(study.graph), functions=functions)
    rows = [line.split()[0] for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert set(rows) == {"source"}


def test_layers_of_a_fetched_parent_are_checked_before_it_is_prepared(
    tmp_path: Path,
) -> None:
    models = {
        "teacher": {"source": "hf:some/model", "prepare": [{"pretrain": {"steps": 3}}]},
        "student": {"source": "prune:teacher", "layers": 5},
    }
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    with pytest.raises(InputError, match=r"models\.student: layers: 5 of a model with 4"):
        start(tmp_path, models=models)
    rows = [line.split()[0] for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert set(rows) == {"source"}


def test_every_model_is_asked_whether_the_study_fits_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    study = prepare_study(validate_recipe(RECIPE))
    functions = replace(FUNCTIONS, check_context="workflow_stages:too_long")
    with pytest.raises(InputError, match="has 10 positions"):
        run_study(study, tmp_path / "run", view=ProgressView(study.graph), functions=functions)
    rows = [line.split()[0] for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert set(rows) == {"source"}


def test_models_are_asked_about_every_pool_with_its_longest_responses(straight: Path) -> None:
    asked = [json.loads(line) for line in (straight / "read.txt").read_text().splitlines()]
    held_out, labels = ["evaluation set held_out", 5, 512], ["pool labels", 20, 512]
    prompts = ["pool prompts", 20, 512]
    assert sorted(asked) == [
        ["model student", "bare", [held_out, ["pool 2H", 10, 512], labels, prompts]],
        ["model teacher", "bare", [held_out, labels, prompts]],
    ], "once, and not again when all is published"


def test_a_pool_is_read_with_the_longest_limit_and_with_worked_responses() -> None:
    arms = {"a": {"student": ["sft", {"grpo": {"sampling": {"max_new_tokens": 700}}}, "grpo"]}}
    recipe = RECIPE | {"arms": arms, "contrasts": [], "sampling": {"max_new_tokens": 60}}
    study = prepare_study(validate_recipe(recipe))
    ((_, found),) = readings_of(study).items()
    assert [(r.where, r.max_new_tokens) for r in found] == [
        ("pool labels", 700),
        ("evaluation set held_out", 60),
        ("pool labels", 0),
    ]
    solutions = [label.solution for label in study.pools.labels("labels")]
    assert list(found[-1].responses) == solutions


def test_the_folder_keeps_the_resolved_recipe(straight: Path) -> None:
    recipe = load_recipe(straight / "run" / "recipe.yaml")
    assert recipe == validate_recipe(RECIPE)
    manifests = (straight / "run" / "artifacts").glob("*/manifest.json")
    kinds = {json.loads(path.read_text())["kind"] for path in manifests}
    assert kinds == {"source", "pretrain", "grpo", "teacher_rollouts", "warmup", "opd", "evaluate"}


def test_a_stage_of_two_arms_is_named_after_its_part_in_each(tmp_path: Path) -> None:
    arms = {
        "cold": {"student": ["grpo"]},
        "same_size": {"teacher": ["grpo"], "student": ["opd"], "teacher_model": "student"},
        "rl": {"teacher": ["grpo"]},
    }
    outcome = start(tmp_path, arms=arms, contrasts=[])
    found = {(row.arm, row.evaluates): row.chain for row in outcome.rows}
    assert found == {
        ("cold", "student"): ("student: grpo(labels)",),
        ("same_size", "student"): ("teacher: grpo(labels)", "student: opd(prompts)"),
        ("rl", "teacher"): ("teacher: grpo(labels)",),
        ("base_student", "teacher"): (),
        ("base_teacher", "teacher"): (),
    }


def test_probes_look_before_between_and_after_the_transfer(tmp_path: Path) -> None:
    outcome = start(tmp_path, diagnostics={"prompts": 3}, seeds=[0, 1])
    moments = [(one.arm, one.after, len(one.found)) for one in outcome.probes]
    assert moments == [
        (arm, after, 2)
        for arm in ("raw_bridge", "bridge", "half")
        for after in ("start", "warmup", "opd")
    ]
    by_moment = {(one.arm, one.after): one.artifacts for one in outcome.probes}
    assert by_moment["bridge", "opd"] == by_moment["half", "opd"]  # the same checkpoint
    assert by_moment["bridge", "start"] != by_moment["raw_bridge", "start"]  # another teacher
    assert len(ran(tmp_path, "probe")) == 2 * 6  # each distinct one once a seed
    assert outcome.probes[0].found[0] == {"reverse_kl": 0.5}
    assert outcome.training["teacher_scored_tokens"] == 0  # evaluation's account has it
    assert outcome.evaluation["teacher_scored_tokens"] == 7 * 12


def test_the_record_keeps_hypotheses_and_the_map(tmp_path: Path) -> None:
    claim = {"better": "bridge", "than": "cold", "match": "verifier_calls"}
    changes = {
        "hypotheses": {"H": {"statement": "So it is.", "claims": [claim]}},
        "map": {"rule": "bridge", "against": "cold", "students": ["student"], "labels": [4, 9]},
    }
    study = prepare_study(validate_recipe(RECIPE | changes))
    record = record_of(study, threads=1)
    write_record(record, tmp_path)
    again = read_record(tmp_path)
    assert again == record
    assert again.hypotheses["H"].claims[0] in again.contrasts
    assert again.map is not None
    # Chosen arms leave out what cannot be said of them.
    few = prepare_study(validate_recipe(RECIPE | changes), arms=["cold"])
    assert record_of(few, threads=1).hypotheses == {}
