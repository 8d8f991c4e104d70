"""`headwater pilot` on real, very small models: what it measures, charges, keeps and refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headwater import api
from headwater.config.loading import validate_recipe
from headwater.console import show_pilot
from headwater.errors import InputError
from headwater.ledger import Ledger
from headwater.workflow.pilot_study import allocations, pilot_study
from headwater.workflow.prepare import prepare_study
from test_cli import STUDY, call
from test_estimate import recipe


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pilot") / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def piloted(study: Path) -> api.Pilot:
    """A pilot of 8 of the 40 labels, 8 attempts each, and one step of GRPO."""
    return api.pilot(study, study.parent / "run", problems=8, attempts=8, trial_steps=1, quiet=True)


def made(run_dir: Path) -> dict[str, int]:
    """When each artifact of a run was published."""
    return {p.parent.name: p.stat().st_mtime_ns for p in run_dir.glob("artifacts/*/manifest.json")}


def test_a_pilot_measures_both_bases(piloted: api.Pilot) -> None:
    found = piloted.found
    for model in (found.teacher, found.student):
        assert 0.0 <= model.rates.pass_rate.low <= model.rates.pass_rate.mean
        assert model.rates.pass_rate.mean <= model.rates.pass_at_k.mean
        assert model.gained is not None and model.end is not None
    assert (found.teacher.name, found.student.name) == ("teacher", "student")
    assert (found.problems, found.attempts, found.group_size) == (8, 8, 4)
    assert 0.0 <= found.distance["top_overlap"] <= 1.0 and found.distance["reverse_kl"] > 0.0
    assert 1 <= found.mean_response <= 24 and found.prompt_tokens > 10


def test_its_labels_are_on_accounts_of_their_own(piloted: api.Pilot) -> None:
    found = piloted.found
    assert (found.spent.labels, found.spent.verifier_calls) == (8, 4 * 8 * 8)
    assert (found.trial.labels, found.trial.verifier_calls, found.trial.updates) == (4, 32, 2)


def test_a_pilot_again_reads_what_is_there(study: Path, piloted: api.Pilot) -> None:
    before = made(piloted.run_dir)
    again = api.pilot(study, piloted.run_dir, problems=8, attempts=8, trial_steps=1, quiet=True)
    assert again.found == piloted.found
    assert made(piloted.run_dir) == before


def test_what_it_costs_is_planned_with_measured_lengths(study: Path, piloted: api.Pilot) -> None:
    costs = piloted.as_dict()["costs"]
    assert {name: cost["arm"] for name, cost in costs.items()} == {
        "cold_grpo": "cold_grpo",
        "half_split": "half",
    }
    mean = piloted.found.mean_response
    assert costs["cold_grpo"]["spending"]["generated_tokens"] == 2 * 4 * 4 * mean


def test_the_tried_labels_are_not_those_of_the_trial(study: Path) -> None:
    prepared = prepare_study(api.load(study), seeds=[0])
    piloted = pilot_study(prepared, problems=8, trial_steps=1)
    nodes = piloted.study.graph.nodes
    pools: dict[str, set[str]] = {"evaluate": set(), "grpo": set(), "probe": set()}
    for node in nodes.values():
        pools.get(node.kind, set()).update(p.id for p in piloted.study.problems_of(node))
    assert (len(pools["evaluate"]), len(pools["grpo"])) == (8, 32)
    assert not pools["evaluate"] & pools["grpo"] and pools["probe"] == pools["evaluate"]
    bases = {model.base for model in piloted.models.values()}
    assert bases <= set(prepared.graph.nodes), "a run finds the pilot's base models"


def test_a_run_takes_over_the_bases_and_is_charged_nothing(
    study: Path, piloted: api.Pilot, capsys: pytest.CaptureFixture[str]
) -> None:
    out = piloted.run_dir
    before = made(out)
    assert call("run", study, "--out", out, "--arms", "cold_grpo", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (row,) = (row for row in results["rows"] if row["arm"] == "cold_grpo")
    assert row["spent"]["verifier_calls"] == 2 * 4 * 4
    after = made(out)
    assert {name: after[name] for name in before} == before
    record = (out / "run.json").read_bytes()
    options = ("--problems", 8, "--attempts", 8, "--trial", 0)
    assert call("pilot", study, "--out", out, *options, "--json") == 0
    untried = json.loads(capsys.readouterr().out)
    assert untried["lead"] is None and untried["teacher"]["end"] is None
    assert untried["student"]["rates"]["pass_rate"] == asdict(piloted.found.student.rates.pass_rate)
    assert (out / "run.json").read_bytes() == record, "a pilot leaves a run's record alone"


def test_it_reads_in_a_terminal(piloted: api.Pilot) -> None:
    console = Console(file=StringIO(), width=200)
    show_pilot(console, piloted)
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    for words in ("pass@4", "groups of 4 with signal", "advice: ", "because ", "docs/pilot.md"):
        assert words in printed
    assert "the pilot read 8 labels with 256 verifier calls, and 4 others" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--problems", 21), "--problems 21: expected 1 to 20"),
        (("--attempts", 3), "--attempts 3: expected at least the recipe's group size, 4"),
        (("--trial", 3), "--trial 3: expected 0 to 2"),
    ],
)
def test_numbers_that_cannot_work_are_refused(
    study: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], said: str
) -> None:
    out = study.parent / "refused"
    assert call("pilot", study, "--out", out, *options) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_recipe_with_nothing_to_choose_between_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    kept = [line for line in STUDY.splitlines() if "half" not in line and "contrasts" not in line]
    path.write_text("\n".join(kept))
    with pytest.raises(InputError, match=r"arms cold_grpo: expected one whose student.*add for"):
        api.pilot(path, tmp_path / "run")


def test_arms_are_recognised_by_what_they_do() -> None:
    assert allocations(api.load("quickstart")) == {
        "cold_grpo": "cold_grpo",
        "bridge": "bridge",
        "half_split": "bridge_grpo",
    }


def test_budgets_and_accounts_of_runs_do_not_meet_a_pilots(piloted: api.Pilot) -> None:
    with Ledger(piloted.run_dir / "ledger.sqlite") as ledger:
        assert ledger.spending(kind="eval").verifier_calls >= piloted.found.spent.verifier_calls
    study = prepare_study(api.load("quickstart"), seeds=[0])
    assert study.recipe.budget.labels == 256
    assert pilot_study(study).study.recipe.budget.limits() == {}


def test_attempts_are_drawn_as_the_arms_own_grpo_draws() -> None:
    grpo = {"grpo": {"sampling": {"temperature": 0.7, "max_new_tokens": 9}}}
    arms = {"bridge": {"teacher": [grpo], "student": ["opd"]}}
    found = pilot_study(prepare_study(validate_recipe(recipe(arms=arms))))
    nodes = found.study.graph.nodes
    teacher, student = found.models["teacher"], found.models["student"]
    assert nodes[teacher.attempts].sampling == grpo["grpo"]["sampling"]
    assert nodes[student.attempts].sampling == {"temperature": 1.0, "max_new_tokens": 10}
