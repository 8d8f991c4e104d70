"""vLLM inside a trainer's process: real stages in the interpreter that has vLLM (`in_process.py`).

Needs what headwater needs beside vLLM, which `make test-vllm` installs there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater.config.compute import VLLM
from headwater.rollout.vllm_process import ServerProcess
from headwater.rollout.vllm_servers import Servers

PYTHON = os.environ.get("VLLM_PYTHON", "")
TESTS = Path(__file__).parents[1]
VOCAB = 60


def _bodies() -> list[dict[str, Any]]:
    """Samples with seeds of their own, then prompts to score."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB, 4 + place % 5).tolist() for place in range(40)]
    drawn = {"max_tokens": 12, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
    drawn |= {"stop_token_ids": [2], "top_p": 1.0, "top_k": 0, "detokenize": False}
    scored = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 5, "detokenize": False}
    return [
        {"token_ids": ids, "sampling_params": drawn | {"seed": place} if place < 32 else scored}
        for place, ids in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def results(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    need = [PYTHON, "-c", "import headwater.workflow.registry, headwater.verify.verifiers"]
    if (said := subprocess.run(need, env=environment, capture_output=True, text=True)).returncode:
        last = said.stderr.strip().splitlines()[-1]
        pytest.skip(f"needs headwater's dependencies beside vLLM, in {PYTHON} too ({last})")
    folder = tmp_path_factory.mktemp("in-process")
    asked = folder / "asked.json"
    asked.write_text(json.dumps(_bodies()), encoding="utf-8")
    script = [PYTHON, str(Path(__file__).with_name("in_process.py"))]
    done = subprocess.run(
        [*script, *map(str, (folder, student, teacher, asked))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_process_is_as_it_was(results: Any) -> None:
    assert results["process"]["changed"] == {"idle": [], "used": [], "after": []}
    assert results["process"]["freed_mib"] > 500  # keys and values, of a GiB


def test_answers_are_those_of_a_server(
    results: Any, student: Path, student_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", student_server.key)
    with Servers(VLLM(urls=(student_server.url,)), student_server._settings, VOCAB) as servers:
        servers.load(student, 0)
        theirs = servers.ask(_bodies())
    ours = results["process"]["answers"]
    assert results["process"]["same"]
    assert [_ids(a) for a in ours] == [_ids(a) for a in theirs]
    assert _logprobs(ours) == pytest.approx(_logprobs(theirs), abs=1e-4)
    assert _scores(ours).keys() == _scores(theirs).keys() and len(_scores(ours)) > 100
    assert _scores(ours) == pytest.approx(_scores(theirs), abs=1e-4)


def _ids(answer: Any) -> list[int]:
    return answer["choices"][0]["token_ids"]


def _logprobs(answers: list[Any]) -> list[float]:
    return [
        token["logprob"] for a in answers[:32] for token in a["choices"][0]["logprobs"]["content"]
    ]


def _scores(answers: list[Any]) -> dict[tuple[int, int, str], float]:
    return {
        (row, place, token): one["logprob"]
        for row, answer in enumerate(answers[32:])
        for place, at in enumerate(answer["prompt_logprobs"])
        for token, one in (at or {}).items()
    }


def test_half_loaded_and_foreign_weights_are_refused(results: Any) -> None:
    found = results["weights"]
    assert "no *.safetensors there" in found["unreadable"] and found["version"] == "loading"
    assert "vLLM in this process answers with weights ['another']" in found["stale"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_from_memory_are_those_of_a_folder(results: Any, dtype: str) -> None:
    """To the bit: after a push, a second one of the same, and while the trainer trains on."""
    found = results["memory"][dtype]
    assert found["tied"] == 1
    for name in ("again", "kept", "written"):
        assert [_ids(a) for a in found[name]] == [_ids(a) for a in found["lent"]]
        assert _logprobs(found[name]) == _logprobs(found["lent"])
        assert _scores(found[name]) == _scores(found["lent"])
    before, after = _scores(found["first"]), _scores(found["lent"])
    assert max(abs(before[key] - after[key]) for key in before.keys() & after.keys()) > 0.1
    assert "of version 1 again" in found["stale"] and "is at version 2" in found["stale"]


def test_an_engine_in_the_process_changes_no_number_of_a_trainer(results: Any) -> None:
    assert results["trainer"]["equal"]


def test_grpo_learns_from_rollouts_of_its_own_process(results: Any) -> None:
    """Resumed as never stopped is asserted where it runs."""
    found = results["grpo"]
    assert len(found["gaps"]) == 4 and max(found["gaps"]) < 1e-4  # of older weights: over 0.01
    assert found["moved"] > 1e-3
    assert found["lags"] == [0.0, 1.0, 1.0, 1.0]
    assert found["written"] == ["server.log"]  # and no weights


def test_opd_with_a_teacher_scored_in_process(results: Any) -> None:
    found = results["opd"]
    for one, other in zip(found["served"], found["local"], strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)
    assert found["spent"]
    losses, gaps = zip(*found["both"], strict=True)
    assert len(losses) == 8 and min(losses) > 0.0 and max(gaps) < 1e-4


def test_one_engine_samples_and_scores_for_teacher_rollouts(results: Any) -> None:
    found = results["teacher_rollouts"]
    least, most = found["mass"]
    assert found["rows"] == 20 and 0.5 < least <= 1.001 and most <= 1e-6
