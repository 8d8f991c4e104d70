"""Reward functions with the trainers' signature, and what becomes of their numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headwater.errors import InputError, StageError
from headwater.types import Label, Verdict
from headwater.verify.grading import Grade
from headwater.verify.reward_calls import caller
from headwater.verify.verifiers import make_verifier

FUNCTIONS = """
import asyncio

def length(completions, **columns):
    return [float(len(text)) for text in completions]

async def judge(prompts, completions, answer, **columns):
    await asyncio.sleep(0)
    return [1.0 if prompt + gold in text else 0.25
            for prompt, text, gold in zip(prompts, completions, answer)]

def named(completions, target):
    return [text == wanted for text, wanted in zip(completions, target)]

def said(prompts, completions, **columns):
    return [float(prompts[0][-1]["role"] == "user" and text[0]["content"] == "hi")
            for text in completions]

def rank(completions, **columns):
    order = sorted(completions)
    return [order.index(text) / len(order) for text in completions]

def moody(completions, **columns):
    for text in completions:
        if text == "raise":
            raise ValueError("secret")
        while text == "hang":
            pass
    return [{"none": None, "nan": float("nan")}.get(text, 1.0) for text in completions]

def bare(completions, **columns):
    return 1.0

def short(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good" for _ in completions]

def other(texts):
    return [0.0 for _ in texts]

def columns(completions, **columns):
    return [float(columns == {"answer": ["7"], "level": [2], "prompts": ["q"]})]
"""

CORRECT, INCORRECT = Verdict.CORRECT, Verdict.INCORRECT
UNPARSEABLE, TIMEOUT = Verdict.UNPARSEABLE, Verdict.TIMEOUT


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return path


def _grades(
    file: Path, name: str, items: Sequence[tuple[str, Any]], **options: float
) -> list[Grade]:
    with make_verifier(f"reward:{file}:{name}", **options) as verifier:  # type: ignore[arg-type]
        return verifier.examine(items)


def _label(problem_id: str = "p", **row: object) -> Label:
    return Label(problem_id, str(row.get("answer", "")), row={"prompt": "q", **row})


def test_the_number_is_the_reward_and_correct_from_one_on(file: Path) -> None:
    items = [("", _label()), ("a", _label()), ("abc", _label())]
    grades = _grades(file, "length", items)
    assert [grade.reward for grade in grades] == [0.0, 1.0, 3.0]
    assert [grade.verdict for grade in grades] == [INCORRECT, CORRECT, CORRECT]
    strict = _grades(file, "length", items, correct_from=2.0)
    assert [grade.verdict for grade in strict] == [INCORRECT, INCORRECT, CORRECT]
    assert grades[2].how == f"reward:{file}:length returned 3"


def test_async_functions_prompts_and_columns(file: Path) -> None:
    items = [("q7", _label(answer="7")), ("q8", _label(answer="7"))]
    assert [grade.reward for grade in _grades(file, "judge", items)] == [1.0, 0.25]
    (grade,) = _grades(file, "columns", [("", _label(answer="7", level=2))])
    assert grade.verdict is CORRECT


def test_a_function_that_names_its_parameters_gets_those(file: Path) -> None:
    items = [("up", _label(target="up")), ("down", _label(target="up"))]
    assert [grade.verdict for grade in _grades(file, "named", items)] == [CORRECT, INCORRECT]


def test_a_column_that_rows_lack_is_named(file: Path) -> None:
    (grade,) = _grades(file, "named", [("up", _label())])
    assert grade.verdict is UNPARSEABLE
    assert grade.how.endswith("raised TypeError (no column target)")


def test_chat_prompts_come_with_chat_completions(file: Path) -> None:
    chat = [{"role": "user", "content": "say hi"}]
    assert [g.reward for g in _grades(file, "said", [("hi", _label(prompt=chat))])] == [1.0]


def test_completions_of_one_problem_are_judged_together(file: Path) -> None:
    items = [("b", _label("p")), ("a", _label("p")), ("b", _label("q"))]
    assert [grade.reward for grade in _grades(file, "rank", items)] == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_completion_costs_itself_alone(file: Path, workers: int) -> None:
    texts = ["fine", "raise", "hang", "none", "nan", "fine"]
    items = [(text, _label("p")) for text in texts] + [("fine", _label("q"))]
    grades = _grades(file, "moody", items, timeout_seconds=0.5, workers=workers)
    assert [grade.verdict for grade in grades] == [
        CORRECT, UNPARSEABLE, TIMEOUT, UNPARSEABLE, UNPARSEABLE, CORRECT, CORRECT,
    ]  # fmt: skip
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert "raised ValueError at my_rewards.py:" in grades[1].how
    assert not any("secret" in grade.how for grade in grades)


@pytest.mark.parametrize(
    ("name", "found"),
    [("bare", "float"), ("short", "1 rewards for 2 completions"), ("words", "a list with str")],
)
def test_what_is_no_list_of_rewards_ends_the_stage(file: Path, name: str, found: str) -> None:
    with pytest.raises(StageError, match=found):
        _grades(file, name, [("a", _label()), ("b", _label())])


@pytest.mark.parametrize(
    ("spec", "found"),
    [("my_rewards.py:other", "it takes"), ("my_rewards.py:absent", "absent"), ("no.py:f", "no.py")],
)
def test_functions_that_cannot_serve_are_found_at_once(file: Path, spec: str, found: str) -> None:
    with pytest.raises(InputError, match=rf"reward:\S*{spec}.*{found}"):
        make_verifier(f"reward:{file.parent}/{spec}")


def test_labels_without_a_row_give_their_answer(file: Path) -> None:
    assert [g.reward for g in _grades(file, "judge", [("7", "7")])] == [1.0]


def test_rows_may_not_pose_as_completions(file: Path) -> None:
    call = caller(f"{file}:length")
    assert call('["four"]', '{"completions": "no", "completion": "no"}') == '{"rewards": [4.0]}'
