"""Preparing a study: what is read, left out and reported before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

from headwater.config.loading import validate_recipe
from headwater.workflow.prepare import prepare_study


def write(path: Path, prompts: list[str]) -> str:
    rows = [{"problem": p, "answer": str(n), "solution": "so"} for n, p in enumerate(prompts)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_contamination_of_worked_solutions_is_reported_too(tmp_path: Path) -> None:
    story = "Tom has {} apples and buys 4 more apples at the small market in town. How many now?"
    recipe = {
        "name": "leaky",
        "task": {
            "train": write(tmp_path / "a" / "train.jsonl", ["2 + 2 = ?", "5 + 5 = ?", "6 - 6 = ?"]),
            "worked": write(
                tmp_path / "b" / "train.jsonl", ["3 + 3 = ?", story.format(3), "7 + 7 = ?"]
            ),
            "eval": {
                "held_out": write(
                    tmp_path / "test.jsonl", ["5 + 5 = ?", "3 + 3 =  ?", story.format(9)]
                )
            },
        },
        "models": {"student": {"source": "tiny:student"}},
        "pools": {"labels": 2, "worked": 2},
        "arms": {"cold": {"student": ["grpo"]}},
    }
    study = prepare_study(validate_recipe(recipe))
    assert [(row["eval_id"], row["kind"], row["action"]) for row in study.contamination] == [
        ("test-0", "exact", "removed"),
        ("test-1", "normalised", "removed"),
        ("test-2", "near", "kept"),
    ]
    assert study.warnings[0].startswith("1 training problems resemble evaluation problems")
    assert {p.prompt for p in study.pools["worked"]} == {story.format(3), "7 + 7 = ?"}
