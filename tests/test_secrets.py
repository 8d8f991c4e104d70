"""Tokens of the environment and of addresses reach no message, no file and no graded text."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from headwater.cli import entry
from headwater.config.loading import validate_recipe
from headwater.errors import InputError, StageError
from headwater.models import sources
from headwater.models.sources import materialise
from headwater.redaction import redact, without_secrets
from headwater.verify.pool import WorkerPool
from headwater.verify.processes import WorkerLimits
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.run import WorkerFunctions, run_study
from test_workflow_run import RECIPE

TOKEN = "n0t-a-real-t0ken-f0r-tests"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(NAMES):
        monkeypatch.setenv(name, f"{TOKEN}-{number}")


def leaks(*arguments: Any) -> None:
    """What a library may do: say the whole request that failed."""
    raise RuntimeError(f"401 for https://me:{TOKEN}-3@hub.example/x, Bearer {os.environ[NAMES[0]]}")


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {TOKEN}-0",
        f"wandb login {TOKEN}-1!",
        f"https://user:{TOKEN}@host.example/path",
        f"git clone https://{TOKEN}@host.example/x",
        f"https://host.example/x?a=1&access_token={TOKEN}&b=2",
        "hf_" + TOKEN.replace("-", "") + "abcdef",
    ],
)
def test_what_is_secret_is_taken_out_and_the_rest_stays(text: str) -> None:
    shown = redact(text)
    assert TOKEN not in shown and TOKEN.replace("-", "") not in shown
    assert "[redacted]" in shown and shown.partition("[redacted]")[0] in text


@pytest.mark.parametrize(
    "text",
    ["hf:Qwen/Qwen3-0.6B", "task:arithmetic?seed=3", "me@example.org", "https://x.example/a?b=c"],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_every_error_is_redacted_also_after_its_way_between_processes() -> None:
    error = StageError(f"failed with {TOKEN}-2")
    assert str(pickle.loads(pickle.dumps(error))) == "failed with [redacted]"


def test_a_hub_error_with_a_token_in_it_is_told_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(f"401 Client Error: https://huggingface.co/x?token={TOKEN}, {TOKEN}-0")

    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"hf:some/model does not load .*redacted") as caught:
        materialise("hf:some/model", tmp_path / "out")
    assert TOKEN not in str(caught.value)
    monkeypatch.setenv("HEADWATER_DEBUG", "1")
    monkeypatch.setattr(entry, "app", lambda **_: materialise("hf:some/model", tmp_path / "out"))
    with pytest.raises(SystemExit):
        entry.main([])
    said = capsys.readouterr().err
    assert "401 Client Error" in said and "Traceback" in said and TOKEN not in said


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    functions = WorkerFunctions(
        "workflow_stages:run_stage", "workflow_stages:same_tokenizer", "test_secrets:leaks"
    )
    study = prepare_study(validate_recipe(RECIPE))
    with pytest.raises(StageError, match=r"RuntimeError: 401 for .*redacted") as caught:
        run_study(study, tmp_path / "run", view=ProgressView(study.graph), functions=functions)
    assert TOKEN not in str(caught.value)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("401 for" in path.read_text(errors="replace") for path in files)  # in a log
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_recipe_with_a_token_is_refused_by_its_key() -> None:
    task = RECIPE["task"] | {"train": f"https://me:{TOKEN}@host.example/train.jsonl"}
    with pytest.raises(InputError, match=r"task\.train: holds what looks like an access") as caught:
        validate_recipe(RECIPE | {"task": task})
    assert TOKEN not in str(caught.value)
    claims = [{"better": "bridge", "than": "cold"}]
    with pytest.raises(InputError, match=r"hypotheses\.h\.statement: holds"):
        hypotheses = {"h": {"statement": f"see {TOKEN}-1", "claims": claims}}
        validate_recipe(RECIPE | {"hypotheses": hypotheses})


def test_a_sealed_worker_has_no_secrets_in_its_environment() -> None:
    for sealed in (True, False):
        limits = WorkerLimits(timeout_seconds=5.0, sealed=sealed)
        pool = WorkerPool("secret_names:names_in_environment", 1, limits)
        (outcome,) = pool.run([("",)])
        pool.close()
        found = set(outcome.value.split())
        assert found.isdisjoint(NAMES) == sealed
        assert "PATH" in found


def test_what_only_says_where_a_secret_is_stays() -> None:
    environment = {"HF_TOKEN_PATH": "/x", "TOKENIZERS_PARALLELISM": "false", "GITHUB_TOKEN": "y"}
    assert without_secrets(environment).keys() == {"HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM"}
