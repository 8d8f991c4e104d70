"""Contrasts compare like with like, or the recipe is refused."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.config.loading import validate_recipe
from headwater.errors import InputError
from headwater.workflow.contrasts import check_contrasts

ARMS: dict[str, Any] = {
    "cold": {"student": ["grpo"]},
    "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]},
    "raw": {"teacher": [], "student": ["warmup", "opd"]},
    "half": {"teacher": [{"grpo": "1H"}], "student": ["warmup", "opd", {"grpo": "2H"}]},
    "replay": {"teacher": [{"grpo": "1H"}], "student": ["warmup", "opd", {"grpo": "1H"}]},
    "long": {"teacher": ["grpo"], "student": ["warmup", {"opd": {"steps": 300}}]},
    "sharp": {"student": [{"grpo": {"clip_high": 0.3}}]},
    "small": {"student": ["grpo"], "student_model": "teacher"},
}


def check(better: str, than: str, differs_in: list[str] | None) -> None:
    recipe = {
        "name": "study",
        "task": {"train": "task:arithmetic", "eval": {"one": "a.jsonl"}},
        "models": {"teacher": {"source": "tiny:teacher"}, "student": {"source": "tiny:student"}},
        "pools": {"labels": 40, "prompts": 100},
        "arms": ARMS,
        "contrasts": [{"better": better, "than": than, "differs_in": differs_in}],
    }
    check_contrasts(validate_recipe(recipe))


@pytest.mark.parametrize(
    ("better", "than", "differs_in"),
    [
        ("bridge", "cold", ["teacher", "transfer"]),
        ("bridge", "raw", ["teacher"]),
        ("half", "replay", ["labels"]),
        ("half", "cold", ["teacher", "transfer", "labels"]),
        ("long", "bridge", ["updates"]),
        ("sharp", "cold", ["student"]),
        ("sharp", "cold", None),
        ("small", "cold", ["student"]),
    ],
)
def test_declared_differences_are_allowed(
    better: str, than: str, differs_in: list[str] | None
) -> None:
    check(better, than, differs_in)


@pytest.mark.parametrize(
    ("better", "than", "differs_in", "message"),
    [
        (
            "half",
            "replay",
            ["teacher"],
            "pool of student grpo is '2H' in half and '1H' in replay; make them equal, or add "
            "labels or student to differs_in",
        ),
        ("long", "bridge", ["teacher"], "steps of student opd is 300 in long and 100 in bridge"),
        ("sharp", "cold", ["updates"], "clip_high of student grpo is 0.3 in sharp and 0.2 in cold"),
        ("small", "cold", ["labels"], "student_model is 'teacher' in small and 'student' in cold"),
        ("bridge", "cold", ["taecher"], "differs_in 'taecher' is not an aspect; choose from"),
    ],
)
def test_other_differences_are_refused_with_key_and_values(
    better: str, than: str, differs_in: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check(better, than, differs_in)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"contrasts[0] ({better} against {than}): ")
