"""Datasets and reward functions as they are written for TRL's GRPOTrainer, used unchanged.

Its calling convention: keyword arguments prompts, completions and completion_ids, each further
column as a list; completions are messages where prompts are; None leaves a row out; functions may
be async; several are summed with weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headwater import api
from headwater.types import Completion, Label
from headwater.verify.called_back import offer
from headwater.verify.verifiers import make_verifier
from headwater.verify.weighted import WeightedRewards
from headwater.workflow.callbacks import Event

# Rewards as people write them, in the shapes that TRL's documentation and examples have.
REWARDS = r"""
import asyncio
import re


def reward_num_unique_chars(completions, **kwargs):
    return [len(set(completion)) for completion in completions]


def reward_solved(completions, solution, log_extra=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    if log_extra is not None:
        log_extra("solution", list(solution))
    return [
        None if truth == "unknown" else float(truth in content)
        for content, truth in zip(contents, solution)
    ]


def reward_format(completions, **kwargs):
    pattern = re.compile(r"^<think>.*</think>.*$", re.DOTALL)
    return [1.0 if pattern.match(c[0]["content"]) else 0.0 for c in completions]


async def reward_judge(prompts, completions, completion_ids, trainer_state=None, **kwargs):
    await asyncio.sleep(0)
    return [
        float(prompt[-1]["content"].endswith("?") and completion[0]["role"] == "assistant")
        for prompt, completion in zip(prompts, completions)
    ]


def reward_short(completion_ids, **kwargs):
    return [-float(max(0, len(ids) - 3)) for ids in completion_ids]


def reward_of_its_task(prompts, completions, task, **kwargs):
    return [float(len(c)) if t == "letters" else None for c, t in zip(completions, task)]
"""
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 2+3?"}]
PLAIN = {"prompt": "what is 2+3?", "task": "letters"}
TALK = {"prompt": CHAT, "solution": "5"}
TEXTS = [Completion("<think>2+3</think>5", (1, 2, 3, 4, 5)), Completion("6", (1,))]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trl") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_like_rewards", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def graded(verifier: str, row: dict[str, Any]) -> list[float]:
    label = Label("p", "", row=row)
    with make_verifier(verifier) as grader:
        return [grade.reward for grade in grader.examine([(text, label) for text in TEXTS])]


@pytest.mark.parametrize(
    ("name", "row", "rewards"),
    [
        ("reward_num_unique_chars", PLAIN, [len(set(TEXTS[0])), 1.0]),
        ("reward_solved", TALK, [1.0, 0.0]),
        ("reward_solved", {**TALK, "solution": "unknown"}, [0.0, 0.0]),
        ("reward_format", TALK, [1.0, 0.0]),
        ("reward_judge", TALK, [1.0, 1.0]),
        ("reward_short", TALK, [-2.0, 0.0]),
        ("reward_of_its_task", PLAIN, [float(len(TEXTS[0])), 1.0]),
        ("reward_of_its_task", {**PLAIN, "task": "sums"}, [0.0, 0.0]),
    ],
)
def test_a_function_gives_the_same_from_a_file_and_as_an_object(
    file: Path, module: ModuleType, name: str, row: dict[str, Any], rewards: list[float]
) -> None:
    assert graded(f"reward:{file}:{name}", row) == rewards
    assert graded(offer(getattr(module, name), name), row) == rewards


def test_several_functions_with_weights(module: ModuleType) -> None:
    functions: list[Callable[..., Any]] = [
        module.reward_solved,
        module.reward_judge,
        module.reward_short,
    ]
    both = WeightedRewards(functions, [1.0, 0.5, 0.25])
    assert graded(offer(both, "sum"), TALK) == [1.0 + 0.5 - 0.5, 0.5]
    skipped = graded(offer(both, "sum"), {**TALK, "solution": "unknown"})
    assert skipped == [0.0, 0.5]


@pytest.mark.slow
def test_a_recipe_trains_on_such_a_file(file: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [CHAT[0], {"role": "user", "content": f"what is {a}+{b}?"}],
            "solution": str(a + b),
        }
        for a in range(5)
        for b in range(4)
    ]
    for name, part in (("train", rows[:14]), ("test", rows[14:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"""
name: trl-like
task:
  train: {tmp_path / "train.jsonl"}
  eval: {{test: {tmp_path / "test.jsonl"}}}
  verifier: "reward:{file}:reward_judge"
  prompt: bare
models: {{student: {{source: "tiny:student"}}}}
pools: {{labels: 12}}
sampling: {{max_new_tokens: 8}}
stages: {{grpo: {{steps: 2, prompts_per_step: 3, group_size: 2}}}}
arms: {{mine: {{student: [grpo]}}}}
evaluation: {{attempts: 2}}
"""
    )
    events: list[Event] = []
    done = api.run(recipe, tmp_path / "run", quiet=True, callbacks=[events.append])
    (row,) = done.results.rows
    assert row.avg_at_k == 1.0  # the judge is content with every answer
    assert [e.step for e in events if (e.kind, e.name) == ("grpo", "step")] == [1, 2]
    (evaluated,) = [event for event in events if event.name == "evaluate"]
    assert (evaluated.kind, evaluated.metrics["pass_rate"]) == ("evaluate", 1.0)


def test_their_rewards_and_datasets_from_python(module: ModuleType, tmp_path: Path) -> None:
    dataset = [TALK, {"prompt": CHAT[1:], "solution": "5"}]
    found = api.grpo(
        "tiny:student",
        dataset,
        [module.reward_solved, module.reward_judge, module.reward_short],
        reward_weights=[1.0, 0.5, 0.25],
        steps=2,
        prompts_per_step=2,
        group_size=2,
        sampling={"max_new_tokens": 6},
        out=tmp_path,
        quiet=True,
    )
    for row in found.rollouts():
        solved = float("5" in row["response"])
        short = -float(max(0, row["response_tokens"] - 3))
        assert row["reward"] == pytest.approx(solved + 0.5 + 0.25 * short)
