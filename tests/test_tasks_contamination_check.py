"""`headwater contamination`: named pairs between any source and any evaluation set."""

import csv
import json
import os
from pathlib import Path

import pytest

from headwater import api
from headwater.cli.entry import main
from headwater.errors import InputError

SHARED = Path(os.environ.get("HEADWATER_SHARED", Path(__file__).parents[2] / "shared")) / "data"
LONG = (
    "A farmer has {} sheep and buys {} more sheep at the market, where a cow is sold for twice as "
    "much as a horse and a goat. How many sheep has he now?"
)


def _write(path: Path, texts: dict[str, str]) -> str:
    rows = ({"id": name, "problem": text, "answer": "1"} for name, text in texts.items())
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    train = {
        "same": "What is 2+2?",
        "styled": r"Find  $\dfrac{1}{2}+x$",
        "template": LONG.format(12, 7),
        "apart": "Name the smallest prime number that is larger than one hundred.",
    }
    held_out = {
        "e1": "What is 2+2?",
        "e2": r"find $\frac{1}{2} + x$.",
        "e3": LONG.format(12, 8),
        "e4": "How many days has a week in a year that is not a leap year?",
    }
    return _write(tmp_path / "train.jsonl", train), _write(tmp_path / "test.jsonl", held_out)


def test_every_pair_is_named(sources: tuple[str, str]) -> None:
    check = api.contamination(sources[0], {"test": sources[1]})
    found = {(p.match.kind, p.match.train_id, p.match.eval_id) for p in check.pairs}
    assert found == {
        ("exact", "same", "e1"), ("normalised", "styled", "e2"), ("near", "template", "e3"),
    }  # fmt: skip
    assert check.counts("test") == {"exact": 1, "normalised": 1, "near": 1}
    near = next(pair for pair in check.pairs if pair.match.kind == "near")
    assert 0.5 <= near.match.share < 1
    assert near.train_text == LONG.format(12, 7) and near.eval_text == LONG.format(12, 8)


def test_stricter_and_looser_n_grams(sources: tuple[str, str]) -> None:
    strict = api.contamination(sources[0], {"test": sources[1]}, near_share=0.9)
    assert strict.counts("test")["near"] == 0
    loose = api.contamination(sources[0], {"test": sources[1]}, ngram_words=3, near_share=0.8)
    assert loose.counts("test")["near"] == 1
    for bad in ({"ngram_words": 1}, {"near_share": 0.0}, {"near_share": 1.5}):
        with pytest.raises(InputError, match="2 words or more"):
            api.contamination(sources[0], {"test": sources[1]}, **bad)  # type: ignore[arg-type]


def test_a_recipe_brings_its_evaluation_sets(sources: tuple[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\ntask: {{train: {sources[0]}, eval: {{held: {sources[1]}}}}}\n"
        "models: {student: {source: 'tiny:student'}}\npools: {labels: 2, split: []}\n"
        "arms: {cold: {student: [grpo]}}\n"
    )
    check = api.contamination(str(recipe))
    assert check.train == sources[0] and list(check.eval_problems) == ["held"]
    with pytest.raises(InputError, match="name evaluation sets with --eval"):
        api.contamination(sources[0])


def test_the_command_prints_and_writes(
    sources: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "pairs.csv"
    with pytest.raises(SystemExit) as ended:
        main(["contamination", sources[0], "--eval", f"held={sources[1]}", "--csv", str(out)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "held: e3" in shown and "template" in shown
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["exact", "normalised", "near"]
    with pytest.raises(SystemExit) as ended:
        main(["contamination", sources[0], *(["--eval", sources[1]] * 2)])
    assert ended.value.code == 2 and "given twice" in capsys.readouterr().err


def test_names_of_sources() -> None:
    named = api.named_sources(["hf:openai/gsm8k:test", "m=x/math.jsonl", "task:arithmetic?count=9"])
    assert named == {
        "gsm8k-test": "hf:openai/gsm8k:test",
        "m": "x/math.jsonl",
        "arithmetic": "task:arithmetic?count=9",
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared data folder ({SHARED})")
def test_known_overlaps_are_found() -> None:
    check = api.contamination(
        str(SHARED / "gsm8k_train.jsonl.gz"), {"test": str(SHARED / "gsm8k_test.jsonl")}
    )
    with (SHARED / "decontamination.csv").open(newline="") as file:
        listed = {
            (row["train_id"], row["test_id"])
            for row in csv.DictReader(file)
            if row["train_file"] == "gsm8k_train"
        }
    assert {(pair.match.train_id, pair.match.eval_id) for pair in check.pairs} == listed
