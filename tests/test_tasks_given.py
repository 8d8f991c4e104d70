"""Problems given as Python values, chats with system messages, and rows that show an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwater.errors import InputError
from headwater.models.tiny import tiny_tokenizer
from headwater.tasks.given import given_problems
from headwater.tasks.problems import load_problems
from headwater.tasks.prompts import encode_prompt, encode_prompts, render_solution
from headwater.workflow.data_identity import identify

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is 2+3?"}
ASSISTANT = {"role": "assistant", "content": "2+3=5"}


def test_rows_and_files_give_the_same_problems(tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "what is 2+3?", "answer": 5}]
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "a", "problem": "what is 2+3?", "answer": 5}\n')
    assert given_problems(rows) == given_problems(str(path)) == load_problems(str(path))


def test_texts_are_prompts_where_no_answer_is_read() -> None:
    data = given_problems(["what is 2+3?", "what is 1+1?"], keep_rows=True)
    assert [problem.prompt for problem in data.problems] == ["what is 2+3?", "what is 1+1?"]
    assert [label.row for label in data.labels] == [
        {"prompt": "what is 2+3?"},
        {"prompt": "what is 1+1?"},
    ]
    with pytest.raises(InputError, match="problems row 1: columns prompt are of no known shape"):
        given_problems(["what is 2+3?"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train": [], "test": []}, r"mapping of train, test.*dataset\['train'\]"),
        (3, "problems is a int; give a source"),
        ([1], "problems row 1 is a int in a list"),
        (iter(["column"]), "problems row 1 is a str in a list_iterator"),
        ([], "problems has no rows"),
    ],
)
def test_what_is_no_list_of_problems_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        given_problems(given)


def test_a_dataset_is_a_list_of_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": [[SYSTEM, USER]], "solution": [r"\boxed{5}"]}
    split = datasets.Dataset.from_dict(rows)
    (problem,) = given_problems(split).problems
    assert (problem.prompt, problem.before) == ("what is 2+3?", (("system", "be brief"),))
    with pytest.raises(InputError, match=r"dataset\['train'\]"):
        given_problems(datasets.DatasetDict(train=split))


def test_messages_before_the_question_reach_the_model() -> None:
    alone, led = (
        given_problems([{"prompt": chat, "answer": "5"}]).problems[0]
        for chat in ([USER], [SYSTEM, USER])
    )
    tokenizer = tiny_tokenizer()
    said = tokenizer.decode(encode_prompt(tokenizer, led, "bare"))
    assert said == tokenizer.apply_chat_template(
        [SYSTEM, USER], add_generation_prompt=True, tokenize=False
    )
    assert encode_prompts(tokenizer, [alone, led], "bare") == [
        encode_prompt(tokenizer, alone, "bare"),
        encode_prompt(tokenizer, led, "bare"),
    ]
    assert identify([alone], []).problems != identify([led], []).problems


@pytest.mark.parametrize(
    ("row", "answer", "before"),
    [
        ({"prompt": USER["content"], "completion": "2+3=5"}, "", ()),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "", ()),
        ({"messages": [USER, ASSISTANT]}, "", ()),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "", (("system", "be brief"),)),
        ({"prompt": USER["content"], "completion": r"2+3=\boxed{5}"}, "5", ()),
        ({"prompt": USER["content"], "completion": "2+3=5\n#### 5"}, "5", ()),
    ],
)
def test_rows_that_show_what_to_say(row: Any, answer: str, before: Any) -> None:
    data = given_problems([row])
    (problem,), (label,) = data.problems, data.labels
    assert (problem.prompt, problem.before) == ("what is 2+3?", before)
    shown = row.get("completion") or row["messages"][-1]["content"]
    assert label.solution == (shown if isinstance(shown, str) else shown[0]["content"])
    assert label.answer == answer
    assert render_solution("bare", label.solution, label.answer) == label.solution


def test_a_solution_without_an_answer_closes_in_no_form() -> None:
    assert render_solution("boxed", "so it goes", "") == "so it goes"


def test_messages_without_an_answer_are_refused_where_rows_are_kept_too() -> None:
    with pytest.raises(InputError, match=r"row 1: messages are of system, user, expected"):
        given_problems([{"messages": [SYSTEM, USER]}], keep_rows=True)
