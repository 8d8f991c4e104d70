"""`headwater eval` as a whole: what it leaves, that it continues, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from headwater import api, console
from headwater.cli.entry import main
from headwater.comparison.compare import BatchDone, compare_models
from headwater.comparison.record import Comparison
from headwater.comparison.settings import EvaluationSettings
from headwater.errors import InputError, Interrupted
from headwater.workflow.outcome import read_attempts
from stage_jobs import TASK, make_model

TASKS = {"sums": TASK, "more": "task:arithmetic?steps=1-2&count=6&seed=4&operations=+-"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two embedded models, one of which has learned more."""
    return {
        name: make_model("tiny:student", tmp_path_factory.mktemp(name), steps=steps)
        for name, steps in (("learned", 40), ("raw", 2))
    }


def make_settings(**changes: Any) -> EvaluationSettings:
    values: dict[str, Any] = {
        "problems": TASKS,
        "attempts": 4,
        "verifier": "exact",
        "prompt": "bare",
        "sampling": {"max_new_tokens": 10},
        "rows": 8,  # batches of four problems
    }
    return api.evaluation_settings(**(values | changes))


@pytest.fixture(scope="module")
def straight(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path]:
    """Both models on both sets, without interruption."""
    out = tmp_path_factory.mktemp("straight") / "out"
    named = [f"{name}={path}" for name, path in models.items()]
    return compare_models(named, make_settings(), out), out


def contents(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on when or how it was made."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for pattern in ("*.json", "*/*.json", "*/*/*.json", "*.parquet", "*/*/*.parquet")
        for path in out.glob(pattern)
    }


def test_what_is_found_is_what_the_attempts_say(straight: tuple[Comparison, Path]) -> None:
    found, out = straight
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(found.as_dict()))
    assert [one["name"] for one in summary["sets"]] == list(TASKS)
    assert [model["name"] for model in summary["models"]] == ["learned", "raw"]
    for one in summary["sets"]:
        for row in one["scores"]:
            (path,) = out.glob(f"{row['model']}-*/{one['name']}/attempts.parquet")
            correct = read_attempts([path], (0,)).correct[0]
            assert row["avg_at_k"]["mean"] == pytest.approx(correct.mean())
            assert row["pass_at"]["4"]["mean"] == pytest.approx(correct.any(axis=1).mean())
            assert row["solved_always"] == correct.all(axis=1).mean()
        gap = one["scores"][0]["avg_at_k"]["mean"] - one["scores"][1]["avg_at_k"]["mean"]
        (pair,) = one["differences"]
        assert (pair["first"], pair["second"]) == ("learned", "raw")
        assert pair["difference"]["mean"] == pytest.approx(gap)
        assert pair["p_value_corrected"] >= pair["difference"]["p_value"]
    assert summary["sets"][0]["scores"][0]["avg_at_k"]["mean"] > 0.1  # it has learned something


def test_a_row_a_problem_adds_up_to_the_scores(straight: tuple[Comparison, Path]) -> None:
    found, out = straight
    rows = pq.read_table(out / "problems.parquet").to_pylist()
    assert len(rows) == 2 * (10 + 6)
    for one in found.sets:
        for model, score in zip(found.models, one.scores, strict=True):
            mine = [r for r in rows if (r["model"], r["set"]) == (model.name, one.name)]
            assert len(mine) == one.problems
            assert np.mean([r["correct"] / r["attempts"] for r in mine]) == pytest.approx(
                score.avg_at_k.mean
            )
            assert np.mean([r["majority_right"] for r in mine]) == pytest.approx(
                score.maj_at_k.mean
            )
            assert np.mean([r["mean_response_tokens"] for r in mine]) == pytest.approx(
                score.mean_response_tokens
            )
            assert sum(r["truncated"] for r in mine) == round(
                score.truncated_share * 4 * one.problems
            )
            answered = [r for r in mine if r["majority_answer"] is not None]
            assert all(r["unparseable"] == 4 for r in mine if r not in answered)


def test_settings_models_and_versions_are_in_the_output(straight: tuple[Comparison, Path]) -> None:
    found, out = straight
    plain = found.as_dict()
    assert plain["settings"]["sampling"] == {
        "temperature": 1.0,
        "max_new_tokens": 10,
        "top_p": 1.0,
        "top_k": None,
    }
    assert plain["versions"].keys() == {"headwater", "torch", "transformers"}
    for model in plain["models"]:
        assert len(model["sha256"]) == 64
        assert list(model["weights"]) == ["model.safetensors"]
        assert (model["device"], model["precision"], model["rows"]) == ("cpu", "float32", 8)
    assert plain["models"][0]["sha256"] != plain["models"][1]["sha256"]
    assert not list(out.glob("*/*/batches")) and not list(out.glob("*/weights*"))


def test_a_second_run_has_the_same_bits(
    straight: tuple[Comparison, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    named = [f"{name}={path}" for name, path in models.items()]
    compare_models(named, make_settings(), tmp_path / "again")
    first, second = contents(straight[1]), contents(tmp_path / "again")
    assert first == second
    assert len(first) == 3 + 2 + 4 + 4  # ours; of models; how and attempts of evaluations


def stopped_after(batches: int) -> Callable[[BatchDone], None]:
    """Ctrl-C once so many batches are done."""
    seen = []

    def on_batch(batch: BatchDone) -> None:
        seen.append(batch)
        if len(seen) == batches:
            raise KeyboardInterrupt

    return on_batch


def test_an_interrupted_evaluation_continues_to_the_same_bits(
    straight: tuple[Comparison, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    named = [f"{name}={path}" for name, path in models.items()]
    out = tmp_path / "out"
    for batches in (2, 1, 3):  # ten problems are three batches, six are two
        with pytest.raises(Interrupted, match="the same command continues") as caught:
            compare_models(named, make_settings(), out, on_batch=stopped_after(batches))
        assert caught.value.exit_code == 130
    told: list[BatchDone] = []
    found = compare_models(named, make_settings(), out, on_batch=told.append)
    assert [(batch.model, batch.set_name, batch.done) for batch in told] == [
        ("raw", "sums", 8),
        ("raw", "sums", 10),
        ("raw", "more", 4),
        ("raw", "more", 6),
    ]
    assert found.read_back == 2
    assert contents(out) == contents(straight[1])
    assert found.as_dict() == straight[0].as_dict()


def test_what_is_finished_is_read_back(
    straight: tuple[Comparison, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(straight[1], out)
    named = [f"{name}={path}" for name, path in models.items()]

    def nothing_to_do(batch: BatchDone) -> None:
        raise AssertionError(batch)

    found = compare_models(named, make_settings(), out, on_batch=nothing_to_do)
    assert (found.read_back, found.evaluations) == (4, 4)
    assert contents(out) == contents(straight[1])
    one = compare_models(
        named[:1], make_settings(problems={"sums": TASK}), out, on_batch=nothing_to_do
    )
    assert one.sets[0].scores[0] == straight[0].sets[0].scores[0]


def test_models_and_sets_may_be_added(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare_models([f"a={models['raw']}"], make_settings(problems={"sums": TASK}), out)
    told: list[BatchDone] = []
    found = compare_models(
        [f"a={models['raw']}", f"b={models['learned']}"],
        make_settings(),
        out,
        on_batch=told.append,
    )
    assert found.read_back == 1
    assert {(batch.model, batch.set_name) for batch in told} == {
        ("a", "more"),
        ("b", "sums"),
        ("b", "more"),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attempts": 2}, "attempts was 4 and is 2"),
        ({"sampling": {"max_new_tokens": 9}}, "sampling.max_new_tokens was 10 and is 9"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"prompt": "boxed"}, "prompt was bare and is boxed"),
        ({"verifier": "math"}, "verifier was exact and is math"),
        ({"limit": 3}, "sets.sums.problems was 10 and is 3"),
        ({"problems": {"sums": TASKS["more"]}}, "sets.sums.sha256"),
        ({"compute": {"precision": "bfloat16"}}, "compute.precision was auto and is bfloat16"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    straight: tuple[Comparison, Path], models: dict[str, Path], changes: Any, words: str
) -> None:
    with pytest.raises(InputError, match="give --out another folder") as caught:
        compare_models([str(models["raw"])], make_settings(**changes), straight[1])
    assert words in str(caught.value)
    assert json.loads((straight[1] / "settings.json").read_text())["attempts"] == 4


def test_another_model_of_the_same_name_is_another_model(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    settings = make_settings(problems={"sums": TASK}, attempts=1)
    hashes = []
    for name in models:
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(models[name], mine)
        found = compare_models([str(mine)], settings, out)
        assert found.read_back == 0
        hashes.append(found.models[0].sha256)
    assert len(set(hashes)) == 2
    assert len(list(out.glob("mine-*"))) == 2


def test_sources_are_fetched_named_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = make_settings(problems=TASK, limit=4, sampling={"max_new_tokens": 4})
    found = compare_models(["tiny:student"], settings)
    assert found.out.parent == Path("runs/eval")
    assert found.out.name.startswith("student-arithmetic-")
    assert (found.sets[0].problems, found.sets[0].available) == (4, 10)
    assert not list(found.out.rglob("*.safetensors"))
    assert compare_models(["tiny:student"], settings).read_back == 1
    other = settings.model_copy(update={"seed": 1})
    assert compare_models(["tiny:student"], other).out != found.out


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (["a", "a"], "a: given twice"),
        (["nowhere"], "nowhere: no such folder"),
        (["x=tiny:student", "x=tiny:teacher"], "two models of one name"),
        (["prune:teacher"], "only a recipe knows the parent"),
    ],
)
def test_models_that_cannot_be_are_refused(tmp_path: Path, named: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        compare_models(named, make_settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"problems": ["a.jsonl", "b/a.jsonl"]}, "a is given twice; name the sets apart"),
        ({"problems": {"../a": "x"}}, "'../a' cannot name a set"),
        ({"problems": []}, "problems = "),
        ({"sampling": {"temperature": 0}}, "4 attempts at temperature 0"),
        ({"sampling": {"temperature": 0, "top_p": 0.5}}, "remove top_p and top_k"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p = 0"),
        ({"compute": {"device": "gpu"}}, "compute.device = 'gpu'"),
        ({"rows": 0}, "rows = 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        make_settings(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sets_are_named_after_their_source() -> None:
    given = ["aime24", "x/gsm8k_test.jsonl.gz", "hf:a/B:test", "task:arithmetic?a=1", "n=y=z.json"]
    assert make_settings(problems=given).problems == {
        "aime24": "aime24",
        "gsm8k_test": "x/gsm8k_test.jsonl.gz",
        "B-test": "hf:a/B:test",
        "arithmetic": "task:arithmetic?a=1",
        "n": "y=z.json",
    }
    assert make_settings(problems="gsm8k").problems == {"gsm8k": "gsm8k"}


def shown(found: Comparison, width: int = 120) -> str:
    terminal = Console(width=width, color_system=None, record=True, highlight=False)
    with terminal.capture() as captured:
        console.show_comparison(terminal, found)
    return captured.get()


def test_the_table_says_what_it_holds_for(
    straight: tuple[Comparison, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(straight[0])
    assert "sums: 10 problems × 4 attempts" in text
    for heading in ("avg@4 ± SE", "pass@2", "pass@4", "maj@4", "cut off", "by level"):
        assert heading in text
    assert "learned − raw" in text
    assert "temperature 1, at most 10 new tokens, prompt bare, verifier exact, seed 0" in text
    assert straight[0].models[0].sha256[:12] in text
    assert capsys.readouterr().err == ""
    narrow = shown(straight[0], 80)
    assert "pass@4" in narrow and "pass@2" not in narrow
    rows = [line for line in narrow.splitlines() if line.startswith(" learned ")]
    assert all(len(line) <= 80 for line in rows) and len(rows) == 4 + 2  # two pairs


def test_the_command_says_how_to_continue(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*more: str) -> int:
        options = "--attempts 1 --temperature 0 --prompt bare --verifier exact --max-new-tokens 8"
        where = ["--out", str(tmp_path / "out"), "--problems", TASK]
        with pytest.raises(SystemExit) as left:
            main(["eval", str(models["raw"]), *options.split(), *where, *more])
        return int(left.value.code or 0)

    with monkeypatch.context() as patch:
        patch.setattr(console, "show_batch", stopped_after(1))
        assert call() == 130
    assert call() == 0
    assert call("--problems", "more=" + TASKS["more"], "--json") == 0
