"""Benchmarks by name: the right dataset, config, split and columns."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from headwater.errors import InputError, SourceUnavailable
from headwater.tasks.benchmarks import BENCHMARKS, known_size
from headwater.tasks.problems import load_problems
from headwater.tasks.stand_ins import evaluation_size

# name: what is asked of the hub, a row as it is published, and the problem and answer in it
PUBLISHED: dict[str, tuple[tuple[str, str | None, str], dict[str, Any], tuple[str, str]]] = {
    "gsm8k": (
        ("openai/gsm8k", "main", "test"),
        {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        ("How many?", "4"),
    ),
    "math500": (
        ("HuggingFaceH4/MATH-500", None, "test"),
        {
            "problem": "Simplify.",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        ("Simplify.", r"\frac{1}{2}"),
    ),
    "aime24": (
        ("HuggingFaceH4/aime_2024", None, "train"),
        {"id": 60, "problem": "Find.", "solution": "Thus 204.", "answer": "204", "year": "2024"},
        ("Find.", "204"),
    ),
    "aime25": (
        ("math-ai/aime25", None, "test"),
        {"problem": "Find it.", "answer": "70", "id": "0"},
        ("Find it.", "70"),
    ),
    "amc23": (
        ("math-ai/amc23", None, "test"),
        {"id": 0, "question": "How far?", "answer": "27.0", "url": "x"},
        ("How far?", "27.0"),
    ),
}


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str | None, str]]:
    """Stands in for the package datasets; returns what is asked of it."""
    asked = []

    def load_dataset(dataset: str, config: str | None, *, split: str) -> Any:
        asked.append((dataset, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    package.exceptions = SimpleNamespace(DatasetsError=RuntimeError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_name_stands_for_a_dataset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request, row, (prompt, answer) = PUBLISHED[name]
    asked = hub(monkeypatch, [row])
    data = load_problems(name)
    assert asked == [request]
    assert (data.problems[0].prompt, data.labels[0].answer) == (prompt, answer)
    if name == "math500":
        assert (data.problems[0].level, data.problems[0].subject) == (2, "Algebra")
    assert load_problems(name, {"problem": "of another file"}) == data  # task.columns


def test_out_of_reach_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no network"))
    with pytest.raises(SourceUnavailable, match="amc23 is a dataset of the hub") as caught:
        load_problems("amc23")
    assert "no network" in str(caught.value)
    assert "--problems amc23=PATH" in str(caught.value)


def test_an_unknown_name_is_told_which_there_are() -> None:
    with pytest.raises(InputError, match="a benchmark: gsm8k, math500, aime24, aime25, amc23"):
        load_problems("gsm9k")


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("gsm8k", 1319),
        ("hf:openai/gsm8k:test", 1319),
        ("hf:HuggingFaceH4/MATH-500:test", 500),
        ("hf:someone/AIME2025", 30),
        ("hf:Maxwell-Jia/AIME_2024:train", 30),
        ("hf:zwhe99/amc23:test", 40),
        ("hf:some/set2024", None),
    ],
)
def test_sizes(source: str, size: int | None) -> None:
    assert known_size(source) == size
    assert evaluation_size(source, 7) == (size or 7)


@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "amc23"])
def test_shared_copies_have_the_known_size(name: str) -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in the shared data folder")
    assert len(load_problems(str(path))) == BENCHMARKS[name].problems
