"""Stages called from Python: with functions, lists of problems and models in memory."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from headwater import api
from headwater.errors import InputError, Interrupted, StageError
from headwater.workflow.callbacks import Event

SUMS = [{"prompt": f"what is {a}+{b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]
#: Of a stage that takes a moment.
SMALL: dict[str, Any] = {
    "prompts_per_step": 4,
    "sampling": {"max_new_tokens": 10},
    "lr": 1e-3,
    "quiet": True,
    "compute": {"threads": 1},
}
GRPO: dict[str, Any] = SMALL | {"group_size": 4, "steps": 4}


def few_letters(completions: list[str], **columns: list[str]) -> list[float]:
    """More for the fewer different letters."""
    return [1.0 / (1 + len(set(text))) for text in completions]


class Straight:
    """GRPO without a stop, by a function of this process, and what it and a callback were told."""

    def __init__(self, out: Path) -> None:
        self.seen: deque[tuple[Any, ...]] = deque()  # no part of what the function is
        self.events: list[Event] = []
        self.settings = GRPO | {"out": out, "callbacks": [self.events.append]}
        self.found = self.run()

    def run(self) -> api.StageRecord:
        seen = self.seen

        def reward(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
            seen.append((prompts[0], answer[0], set(columns)))
            return few_letters(completions)

        return api.grpo("tiny:student", SUMS, reward, **self.settings)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def test_grpo_on_a_function_of_this_process(straight: Straight) -> None:
    found = straight.found
    assert found.model.joinpath("model.safetensors").is_file()
    assert {row["prompt"]: row["answer"] for row in SUMS}.items() >= {s[:2] for s in straight.seen}
    assert all(columns == {"completion_ids"} for *_, columns in straight.seen)
    assert [row["step"] for row in found.metrics] == [0, 1, 2, 3]
    rows = found.rollouts()
    assert len(rows) == 4 * 4 * 4
    assert rows[0]["reward"] == pytest.approx(few_letters([rows[0]["response"]])[0])
    assert found.spent["verifier_calls"] == 4 * 4 * 4
    assert found.spent["updates"] == 4
    assert json.loads(json.dumps(found.as_dict()))["metrics"] == list(found.metrics)
    with pytest.raises(InputError, match=r"no metric 'rewards'; grpo has .*reward,"):
        found.column("rewards")


def test_callbacks_are_told_every_step(straight: Straight) -> None:
    told = [event for event in straight.events if event.kind == "grpo"]
    assert [(e.name, e.step) for e in told] == [
        ("start", 0), ("step", 1), ("step", 2), ("step", 3), ("step", 4), ("end", 4),
    ]  # fmt: skip
    assert [e.metrics["reward"] for e in told[1:5]] == straight.found.column("reward")
    assert {e.total for e in told[1:]} == {4}


def test_what_is_there_is_not_trained_again(straight: Straight) -> None:
    before = len(straight.seen), len(straight.events)
    assert straight.run() == straight.found
    assert (len(straight.seen), len(straight.events)) == before


@pytest.mark.slow
def test_a_callback_stops_a_stage_that_then_continues(straight: Straight, tmp_path: Path) -> None:
    events: list[Event] = []

    def stop_after_one(event: Event) -> bool:
        return event.name == "step"

    def call(callback: Callable[[Event], object]) -> api.StageRecord:
        given = GRPO | {"out": tmp_path, "callbacks": [callback]}
        return api.grpo("tiny:student", SUMS, few_letters, **given)

    with pytest.raises(Interrupted, match="run the same command again to continue"):
        call(stop_after_one)
    resumed = call(events.append)
    steps = [event.step for event in events if event.name == "step"]
    assert steps == list(range(steps[0], 5)) and steps[0] > 1
    one, other = (load_file(r.model / "model.safetensors") for r in (resumed, straight.found))
    assert all((one[name] == other[name]).all() for name in one)
    assert resumed.column("reward") == straight.found.column("reward")


def test_an_error_of_a_callback_comes_out(tmp_path: Path) -> None:
    def fails(event: Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        api.grpo("tiny:student", SUMS, few_letters, out=tmp_path, callbacks=[fails], **GRPO)


@pytest.mark.slow
def test_distillation_from_a_model_in_memory(tmp_path: Path) -> None:
    from headwater.models.tiny import tiny_model, tiny_tokenizer

    teacher = tiny_model("small", seed=5), tiny_tokenizer()
    prompts = [row["prompt"] for row in SUMS]
    small = SMALL | {"out": tmp_path}
    warm = {k: v for k, v in small.items() if k != "prompts_per_step"} | {"batch_size": 8}
    first = api.warmup("tiny:student", teacher, prompts, steps=2, **warm)
    assert first.spent["generated_tokens"] > 0 and first.spent["labels"] == 0
    assert len(first.rollouts()) == len(prompts)
    again = api.warmup(first, teacher, prompts, steps=2, **warm)
    assert again.rollouts_path == first.rollouts_path  # drawn once
    found = api.opd(first, teacher, prompts, steps=2, group_size=2, **small)
    assert found.column("kl")[0] > 0
    assert len(list((tmp_path / "given").iterdir())) == 1
    assert api.report(tmp_path).run_dir == tmp_path


def test_sft_on_conversations(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in SUMS
    ]
    settings: dict[str, Any] = {"steps": 12, "batch_size": 16, "lr": 3e-3, "quiet": True}
    found = api.sft("tiny:student", rows, out=tmp_path, **settings)
    assert found.column("nll")[-1] < 0.8 * found.column("nll")[0]
    assert found.spent["labels"] == len(rows)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: api.grpo(m, SUMS, few_letters, step=3), "grpo: step: unknown key; did you mean"),
        (lambda m: api.grpo(m, SUMS, few_letters, group_size=1), "set group_size >= 2"),
        (lambda m: api.grpo(m, ["a"], "math"), "columns prompt are of no known shape"),
        (lambda m: api.grpo(m, SUMS, "moth"), "verifier 'moth' is not known"),
        (lambda m: api.grpo(m, SUMS, []), "reward is a list of nothing"),
        (lambda m: api.grpo(m, SUMS, few_letters, reward_weights=[1.0]), "1 reward_weights for 0"),
        (lambda m: api.grpo(m, SUMS, lambda completions, truth: []), "needs truth, but the probl"),
        (lambda m: api.grpo(m, SUMS, lambda texts: []), "reward: it takes .texts.; a reward funct"),
        (lambda m: api.opd(m, "tiny:huge", ["a"]), "unknown embedded model 'huge'"),
        (lambda m: api.opd(object(), m, ["a"]), r"model is a object; .* or \(model, tokenizer\)"),
        (lambda m: api.sft(m, SUMS), "has no worked solution"),
        (lambda m: api.grpo("./nowhere", SUMS), "./nowhere does not exist"),
        (lambda m: api.pretrain("tiny:student", "gsm8k"), "set task.train to task:arithmetic"),
        (lambda m: api.grpo(m, SUMS, few_letters, compute={"device": "tpu"}), "compute.device"),
    ],
)
def test_bad_input_is_found_before_anything_runs(
    call: Callable[[str], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        call("tiny:student")
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_always_fails_ends_the_stage(tmp_path: Path) -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(StageError, match=r"raised KeyError at test_api_stages.py:\d+ every time"):
        api.grpo("tiny:student", SUMS, broken, out=tmp_path, **GRPO)


def test_adapters_without_their_package_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.workflow.node_settings.find_spec", lambda name: None)
    with pytest.raises(InputError, match="package peft is not installed"):
        api.sft("tiny:student", [{"prompt": "1", "completion": "2"}], lora=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
