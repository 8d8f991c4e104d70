"""Loading problems: every known shape, every format, every way a row can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from headwater.errors import InputError, SourceUnavailable
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.tasks.stand_ins import evaluation_size, stand_ins
from headwater.types import Label, Problem

SHARED = Path(os.environ.get("HEADWATER_SHARED", Path(__file__).parents[2] / "shared")) / "data"

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "What is $2+2$?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def write(path: Path, *rows: Any) -> str:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def load_one(tmp_path: Path, row: dict[str, Any], **columns: str) -> tuple[Problem, Label]:
    data = load_problems(write(tmp_path / "train.jsonl", row), columns or None)
    return data.problems[0], data.labels[0]


def test_headwater_rows_keep_every_field(tmp_path: Path) -> None:
    row = {"id": "a", "problem": " 1+1? ", "answer": 2.0, "source": "S", "level": 3}
    problem, label = load_one(tmp_path, {**row, "subject": "sums", "solution": "1+1=2"})
    assert problem == Problem("a", "1+1?", "S", 3, "sums")
    assert label == Label("a", "2", "1+1=2")


def test_rows_without_id_and_source_are_named_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl.gz", {"problem": "p", "answer": "1"}, "",
                 {"problem": "q", "answer": "2"})  # fmt: skip
    data = load_problems(path)
    assert [problem.id for problem in data.problems] == ["sums-0", "sums-1"]
    assert {problem.source for problem in data.problems} == {"sums"}


def test_gsm8k_rows_are_split_into_solution_and_answer(tmp_path: Path) -> None:
    answer = "5 boxes of 300 are 5*300=<<5*300=1500>>1500.\n#### 1,500"
    problem, label = load_one(tmp_path, {"question": "How many?", "answer": answer})
    assert problem.prompt == "How many?"
    assert label == Label("train-0", "1500", "5 boxes of 300 are 5*300=1500.")


def test_math_rows_give_the_last_box_level_and_type(tmp_path: Path) -> None:
    solution = r"First \boxed{1}, no: $x=\boxed{\frac{1}{\sqrt{2}}}$."
    row = {"problem": "x?", "level": "Level 5", "type": "Algebra", "solution": solution}
    problem, label = load_one(tmp_path, row)
    assert (problem.level, problem.subject) == (5, "Algebra")
    assert label == Label("train-0", r"\frac{1}{\sqrt{2}}", solution)
    unknown, _ = load_one(tmp_path, {**row, "level": "Level ?"})
    assert unknown.level is None


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": DAPO_PROMPT}], DAPO_PROMPT])
def test_dapo_rows_lose_their_template_and_their_copies(tmp_path: Path, prompt: object) -> None:
    row = {
        "data_source": "math_dapo",
        "prompt": prompt,
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "extra_info": {"index": "9a9b"},
    }
    data = load_problems(write(tmp_path / "dapo.jsonl", row, row, row))
    assert data.problems == (Problem("9a9b", "What is $2+2$?", "math_dapo"),)
    assert data.labels == (Label("9a9b", "4"),)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"answer": r"$\boxed{7}$"}, Label("train-0", "7")),
        ({"answer": "7", "solution": "3+4=7"}, Label("train-0", "7", "3+4=7")),
        ({"solution": r"$\frac{1}{2}$"}, Label("train-0", r"\frac{1}{2}")),
        ({"solution": r"\boxed{7}"}, Label("train-0", "7")),
        ({"solution": r"3+4=\boxed{7}"}, Label("train-0", "7", r"3+4=\boxed{7}")),
        ({"solution": "3+4=7\n#### 7"}, Label("train-0", "7", "3+4=7")),
    ],
)
def test_trl_rows_take_answers_and_solutions(
    tmp_path: Path, fields: dict[str, str], label: Label
) -> None:
    prompt = [{"role": "user", "content": "3+4?"}]
    problem, found = load_one(tmp_path, {"prompt": prompt, **fields})
    assert (problem.prompt, found) == ("3+4?", label)
    assert load_one(tmp_path, {"prompt": "3+4?", **fields}) == (problem, found)


def test_columns_map_our_names_to_theirs_into_records_too(tmp_path: Path) -> None:
    row = {"q": "3+4?", "gold": {"value": 7}, "level": 2, "answer": "not this"}
    problem, label = load_one(tmp_path, row, problem="q", answer="gold.value")
    assert (problem.prompt, problem.level, label.answer) == ("3+4?", 2, "7")


def test_all_formats_hold_the_same_problems(tmp_path: Path) -> None:
    rows = [{"id": str(n), "problem": f"{n}+1?", "answer": str(n + 1)} for n in range(5)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    write(tmp_path / "t.jsonl", *rows)
    write(tmp_path / "t.jsonl.gz", *rows)
    loaded = [
        load_problems(str(tmp_path / f"t.{end}"))
        for end in ("jsonl", "jsonl.gz", "json", "parquet")
    ]
    assert all(data == loaded[0] for data in loaded)
    assert len(loaded[0]) == 5


def test_messages_in_parquet_are_read(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    data = load_problems(str(tmp_path / "d.parquet"))
    assert (data.problems[0].prompt, data.labels[0].answer) == ("2+2?", "4")


def test_the_data_hash_covers_every_field(tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": "a", "problem": "p", "answer": "1", "source": "s"}
    variants = [row, *({**row, key: value} for key, value in
        [("id", "b"), ("problem", "q"), ("answer", "2"), ("source", "t"), ("level", 1),
         ("subject", "x"), ("solution", "y")])]  # fmt: skip
    hashes = {load_problems(write(tmp_path / "t.jsonl", v)).data_hash for v in variants}
    assert len(hashes) == len(variants)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (['{"problem": "p", "answer": "1"}', "{oops"], r"t\.jsonl:2: not JSON.*one JSON object"),
        (["[1, 2]"], r"t\.jsonl:1: '\[1, 2\]' is not a JSON object"),
        ([{"problem": "p", "answer": "1"}, {"problem": "q"}], r":2: 'answer' is missing"),
        ([{"problem": " ", "answer": "1"}], r":1: the problem is empty"),
        ([{"problem": "p", "answer": " "}], r":1: the answer is empty"),
        ([{"problem": "p", "answer": ["1"]}], r":1: answer is \"\['1'\]\" of type list"),
        ([{"problem": "p", "answer": True}], r":1: answer is 'True' of type bool"),
        ([{"problem": "p", "answer": "1", "level": "hard"}], r":1: level 'hard' is no level"),
        ([{"id": "a", "problem": "p", "answer": "1"}] * 2, r":2: id 'a' was already given by .*:1"),
        ([{"text": "p", "label": "1"}], r":1: columns text, label are of no known shape"),
        ([{"problem": "p", "solution": "so 1"}], r":1: the solution has no \\boxed answer"),
        ([{"question": "p", "answer": "1"}], r":1: the answer has no '####"),
        ([{"prompt": "p", "solution": "a\nb"}], r":1: the solution of 3 characters marks no final"),
        ([{"prompt": "p", "reward_model": {}}], r":1: reward_model has no ground_truth"),
        ([{"prompt": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
           "answer": "1"}], r":1: prompt has messages of user, assistant, expected a user's as"),
        ([{"prompt": [{"role": "tool", "content": "p"}], "answer": "1"}],
         r":1: prompt .* is neither text nor chat messages; write text, or a list of .role, cont"),
        ([{"prompt": [], "answer": "1"}], r":1: prompt '\[\]' is neither text nor chat messages"),
        ([{"prompt": "p", "completion": [{"role": "user", "content": "c"}]}],
         r":1: completion has messages of user, expected text or one message of the assistant's"),
        ([{"messages": [{"role": "user", "content": "p"}]}],
         r":1: messages are of user, expected the user's and the assistant's as the last two"),
        ([""], r"t\.jsonl has no rows"),
    ],
)  # fmt: skip
def test_bad_rows_name_place_value_and_cure(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_problems(write(tmp_path / "t.jsonl", *rows))


def test_bad_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"q": "p", "a": "1"})
    with pytest.raises(InputError, match=r"maps 'prompt', which is no field; use one of id, prob"):
        load_problems(path, {"prompt": "q"})
    with pytest.raises(InputError, match=r"maps 'problem' to 'question'.*not among q, a"):
        load_problems(path, {"problem": "question"})


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl is not a file"):
        load_problems(str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match=r"data\.csv is of no known kind"):
        load_problems("data.csv")
    whole = Path(
        write(tmp_path / "cut.jsonl.gz", *[{"problem": str(n), "answer": "1"} for n in range(999)])
    )
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: unreadable after line \d+"):
        load_problems(str(whole))
    for name, says in (
        ("t.json", "write a list of objects"),
        ("t.parquet", "unreadable as Parquet"),
    ):
        (tmp_path / name).write_text('{"problem": "p"}')
        with pytest.raises(InputError, match=says):
            load_problems(str(tmp_path / name))
    (tmp_path / "latin.jsonl").write_bytes(
        '{"problem": "caf\xe9", "answer": "1"}'.encode("latin-1")
    )
    with pytest.raises(InputError, match=r"latin\.jsonl:1: not JSON.*UTF-8"):
        load_problems(str(tmp_path / "latin.jsonl"))


def test_embedded_tasks_take_options_as_written() -> None:
    data = load_problems("task:arithmetic?count=5&operations=+")
    assert len(data) == 5
    assert all("+" in p.prompt and "*" not in p.prompt for p in data.problems)
    for source, says in [
        ("task:algebra", "names no embedded task"),
        ("task:arithmetic?count", "is not option=value"),
        ("task:arithmetic?count=1&count=2", "repeats an option"),
    ]:
        with pytest.raises(InputError, match=says):
            load_problems(source)
    with pytest.raises(InputError, match=r"remove task\.columns"):
        load_problems("task:arithmetic", {"problem": "q"})


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d", "hf:a::b"])
def test_misspelt_hub_sources_are_refused(source: str) -> None:
    with pytest.raises(InputError, match="write hf:ID, hf:ID:SPLIT"):
        load_problems(source)


def test_hub_datasets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra hub (pip install headwater[hub])")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder / "test.jsonl", {"question": "2+2?", "answer": "2+2=4\n#### 4"})
    data = load_problems(f"hf:{folder}:test")
    assert data.problems == (Problem("sums-test-0", "2+2?", "sums-test"),)
    assert data.labels == (Label("sums-test-0", "4", "2+2=4"),)
    with pytest.raises(InputError, match="check the id, config and split"):
        load_problems(f"hf:{folder}:validation")


def test_a_hub_out_of_reach_is_told_from_a_dataset_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reading(error: Exception) -> type[InputError]:
        def load_dataset(*_: object, **__: object) -> None:
            raise error

        package = ModuleType("datasets")
        package.load_dataset = load_dataset  # type: ignore[attr-defined]
        package.exceptions = SimpleNamespace(DatasetsError=RuntimeError)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", package)
        with pytest.raises(InputError, match="hf:some/data") as caught:
            load_problems("hf:some/data")
        return caught.type

    assert reading(ConnectionError("Couldn't reach 'some/data' on the Hub")) is SourceUnavailable
    assert reading(FileNotFoundError("Dataset 'some/data' doesn't exist")) is InputError
    assert reading(ValueError("unknown split")) is InputError
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceUnavailable, match="needs the package datasets"):
        load_problems("hf:some/data")


@pytest.mark.parametrize(
    ("source", "asked", "size"),
    [
        ("hf:HuggingFaceH4/MATH-500:test", None, 500),
        ("hf:math-ai/aime25:test", 16, 30),
        ("hf:math-ai/amc23:test", None, 40),
        ("hf:openai/gsm8k:test", 64, 1319),
        ("hf:some/set", 64, 64),
        ("hf:some/set", None, 500),
    ],
)
def test_sizes_of_evaluation_sets_to_plan_with(source: str, asked: int | None, size: int) -> None:
    assert evaluation_size(source, asked) == size


def test_stand_ins_are_different_problems_with_solutions() -> None:
    data = stand_ins("hf:some/set", 3)
    assert len({problem.prompt for problem in data.problems}) == 3
    assert all(label.solution for label in data.labels)


def test_labels_do_not_show_and_do_not_drift() -> None:
    problems = [Problem("a", "p", "s"), Problem("b", "q", "s")]
    labels = [Label("a", "GOLD-1"), Label("b", "GOLD-2")]
    data = LabelledProblems.of(problems, labels)
    assert "GOLD" not in repr(data)
    assert data.only(lambda problem: problem.id == "b").labels == (labels[1],)
    assert data.without_labels().labels == ()
    with pytest.raises(InputError, match="do not name the same ids"):
        LabelledProblems.of(problems, labels[::-1])
    with pytest.raises(InputError, match="'a' occurs twice"):
        LabelledProblems.of(problems[:1] * 2, labels[:1] * 2)


@pytest.mark.parametrize(
    ("name", "count", "solved", "first"),
    [
        ("gsm8k_train.jsonl.gz", 7473, 7473, ("gsm8k-train-0", "72")),
        ("math_train.jsonl.gz", 7497, 0, ("math-train-algebra-0", "0")),
        ("dapo_math_17k.jsonl.gz", 16172, 0, ("dapo-9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "34")),
        ("svamp.jsonl", 1000, 0, ("svamp-chal-777", "145")),
        ("mawps.jsonl", 1849, 0, ("mawps-0", "43")),
    ],
)
def test_real_files_load_whole(name: str, count: int, solved: int, first: tuple[str, str]) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {name} in the shared data folder (HEADWATER_SHARED)")
    data = load_problems(str(SHARED / name))
    assert len(data) == count
    assert (data.problems[0].id, data.labels[0].answer) == first
    assert sum(label.solution is not None for label in data.labels) == solved
