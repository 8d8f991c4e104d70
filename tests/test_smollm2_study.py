"""The real-model study: its problem files, and that trials and study start from the same bases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from headwater.config.loading import load_recipe
from headwater.recipes import find_recipe
from headwater.tasks.contamination import find_matches
from headwater.tasks.problems import load_problems

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gail", "Hal", "Ines", "Jan")
THINGS = ("apples", "pens", "cards", "books", "stones", "shells", "coins", "cups", "hats", "keys")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import smollm2_data

    yield smollm2_data
    del sys.modules["smollm2_data"]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(name: str, count: int) -> list[dict[str, str]]:
    """Different texts, each short of the words that near matches are made of."""
    rows = []
    for n in range(count):
        who, what = NAMES[n % 10], THINGS[n // 10 % 10]
        a, b = 30 + n % 37, 2 + n % 11
        text = f"{name}: {who} has {a} {what}, loses {b}"
        rows.append({"id": f"{name}-{n}", "problem": text, "answer": str(a - b)})
    return rows


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Joan had 70 shells. She has 27 left. How many are gone?", "43", ["70 - 27 = 43"]),
        ("2 boxes of 2 pens. How many pens?", "4", ["2 + 2 = 4", "2 * 2 = 4"]),
        ("12 cups in 3 rows. How many in a row?", "4", ["12 / 3 = 4"]),
        ("1,000 cups and 24 more.", "1024", ["1000 + 24 = 1024"]),
        ("0 cups among 3, and 0 pens", "1/0", []),
        ("Tom packs 3 and 4 and 5.", "60", []),
    ],
)
def test_operations_are_those_that_give_the_answer(
    script: Any, text: str, answer: str, expected: list[str]
) -> None:
    assert list(dict.fromkeys(script.operations(text, answer))) == expected


def test_files_are_apart_and_hold_what_one_operation_answers(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_steps = {"id": "two", "problem": "Tom packs 3 bags of 4 and 5 more.", "answer": "17"}
    large = {"id": "large", "problem": "Tom has 700 pens and loses 200.", "answer": "500"}
    template = (
        "Early this morning, long before the first of us were up and about, the old baker at our "
        "corner put {} rolls aside and sold {}."
    )
    alike = [
        {"id": f"alike-{n}", "problem": template.format(50 + n, 7), "answer": str(43 + n)}
        for n in range(10)
    ]
    mawps = write(tmp_path / "mawps.jsonl", [*problems("m", 240), *alike, two_steps, large])
    repeated = [{**row, "id": f"again-{n}"} for n, row in enumerate(problems("s", 230))]
    svamp = write(tmp_path / "svamp.jsonl", [*repeated, *problems("s", 230)])
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["smollm2_data.py", "--mawps", mawps, "--svamp", svamp, "--out", str(out)]
    )
    script.main()
    assert f"{out / 'mawps_test.jsonl'}: 200 problems" in capsys.readouterr().out
    sets = {path.stem: load_problems(str(path)) for path in sorted(out.iterdir())}
    in_test = sum(p.id.startswith("alike") for p in sets["mawps_test"].problems)
    assert 0 < in_test < 10  # the others of that template are nowhere
    assert {name: len(data) for name, data in sets.items()} == {
        "mawps_test": 200,
        "mawps_train": 40 + in_test,
        "svamp_test": 200,
        "worked": 30,
    }
    tests = {name: sets[name] for name in ("mawps_test", "svamp_test")}
    for name in ("mawps_train", "worked"):
        assert find_matches(sets[name], tests) == []
        solutions = [str(label.solution) for label in sets[name].labels]
        answers = [label.answer for label in sets[name].labels]
        assert all(s.endswith(f"= {a}") for s, a in zip(solutions, answers, strict=True))


def test_trials_and_study_start_from_the_same_bases() -> None:
    trials, study = (load_recipe(find_recipe(f"smollm2-{name}")) for name in ("trials", "study"))
    assert trials.task.model_copy(update={"eval": study.task.eval}) == study.task
    assert {name: study.models[name] for name in trials.models} == trials.models
    assert (trials.pools, trials.sampling, trials.stages.sft) == (
        study.pools,
        study.sampling,
        study.stages.sft,
    )
    assert not set(trials.seeds) & set(study.seeds)
