"""The paper's arms and hypotheses by name, and the cells of a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwater.config.loading import load_recipe, validate_recipe, write_resolved
from headwater.config.recipe import Recipe
from headwater.config.stages import GRPOStage
from headwater.errors import InputError
from headwater.workflow.prepare import prepare_study


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "name": "grid",
        "task": {
            "train": "task:arithmetic?count=150",
            "eval": {"one": "task:arithmetic?seed=3&count=9"},
        },
        "models": {
            "student": {"source": "tiny:student"},
            "teacher": {"source": "tiny:teacher"},
            "large": {"source": "tiny:large"},
        },
        "pools": {"labels": 40, "prompts": 60},
        "arms": "paper",
        **changes,
    }


def chains(recipe: Recipe, arm: str) -> tuple[list[str], list[str]]:
    """Teacher's and student's stages as KIND(POOL)."""
    found = recipe.arms[arm]
    teacher, student = (
        [f"{item.kind}({recipe.pool(item)})" for item in chain or ()]
        for chain in (found.teacher, found.student)
    )
    return teacher, student


@pytest.mark.parametrize(
    ("arm", "teacher", "student"),
    [
        ("cold_grpo", [], ["grpo(labels)"]),
        ("direct_grpo", ["grpo(labels)"], []),
        ("bridge", ["grpo(labels)"], ["warmup(prompts)", "opd(prompts)"]),
        ("raw_bridge", [], ["warmup(prompts)", "opd(prompts)"]),
        ("sft_bridge", ["sft(labels)"], ["warmup(prompts)", "opd(prompts)"]),
        ("opd_only", ["grpo(labels)"], ["opd(prompts)"]),
        ("sft_sample_sft", ["sft(labels)"], ["sample_sft(prompts)"]),
        ("same_size_bridge", ["grpo(labels)"], ["warmup(prompts)", "opd(prompts)"]),
        ("half_split", ["grpo(1H)"], ["warmup(prompts)", "opd(prompts)", "grpo(2H)"]),
        ("replay", ["grpo(1H)"], ["warmup(prompts)", "opd(prompts)", "grpo(1H)"]),
        ("sft_half_split", ["sft(1H)"], ["warmup(prompts)", "opd(prompts)", "grpo(2H)"]),
        ("opd_split", ["grpo(1H)"], ["opd(prompts)", "grpo(2H)"]),
        ("sample_split", ["grpo(1H)"], ["sample_sft(prompts)", "grpo(2H)"]),
    ],
)
def test_routes_are_those_of_the_method(arm: str, teacher: list[str], student: list[str]) -> None:
    recipe = validate_recipe(plain())
    assert chains(recipe, arm) == (teacher, student)
    assert recipe.arms[arm].student_model == "student"
    own_size = "student" if arm.startswith("same_size") else "teacher"
    assert recipe.arms[arm].teacher_model == own_size


def test_every_teacher_has_its_own_arms_and_the_ladder_every_size() -> None:
    every = validate_recipe(plain()).arms
    assert every["half_split.large"].teacher_model == "large"
    assert every["direct_grpo.large"].title == "Direct GRPO on the large"
    assert "same_size_bridge.large" not in every
    fewer = validate_recipe(plain(arms=[{"paper": {"teachers": ["teacher"]}}])).arms
    assert {name for name in fewer if name.endswith(".large")} == {
        "base_teacher.large",
        "direct_grpo.large",
    }


def test_half_the_labels_take_half_the_steps() -> None:
    recipe = validate_recipe(plain(stages={"grpo": {"steps": 24}}))
    split = recipe.arms["half_split"]
    grpo = [*(split.teacher or ()), (split.student or ())[-1]]
    assert [recipe.stage(item).steps for item in grpo] == [12, 12]
    usual = validate_recipe(plain()).arms["half_split"].teacher or ()
    assert usual[0].overrides["steps"] == GRPOStage().steps // 2


def test_without_a_pool_of_prompts_half_bridges_read_their_half() -> None:
    recipe = validate_recipe(plain(pools={"labels": 40, "split": ["first", "second"]}))
    assert chains(recipe, "half_split") == (
        ["grpo(first)"],
        ["warmup(first)", "opd(first)", "grpo(second)"],
    )
    assert chains(recipe, "bridge")[1] == ["warmup(labels)", "opd(labels)"]


def test_worked_solutions_of_another_pool_make_the_taught_teacher() -> None:
    recipe = validate_recipe(plain(pools={"labels": 40, "worked": 20, "prompts": 60}))
    assert chains(recipe, "sft_bridge")[0] == chains(recipe, "sft_half_split")[0] == ["sft(worked)"]


def test_arms_by_name_beside_arms_of_ones_own() -> None:
    mine = {"mine": {"student": [{"grpo": {"lr": 0.1}}]}}
    listed = validate_recipe(plain(arms=["R1", "bridge.large", mine])).arms
    assert list(listed) == ["cold_grpo", "bridge.large", "mine"]
    mapped = validate_recipe(plain(arms={"cold_grpo": None, **mine})).arms
    assert mapped["cold_grpo"] == listed["cold_grpo"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ["bridg"]}, "arms: 'bridg' is not an arm of the paper; give it a"),
        ({"arms": ["bridge.huge"]}, "arms: 'bridge.huge' is not an arm of the paper"),
        ({"arms": ["same_size_bridge.large"]}, "'same_size_bridge.large' is not an arm"),
        ({"arms": [3]}, "arms: 3 is no arm; list names such as cold_grpo"),
        ({"arms": [{"paper": {"teachers": ["big"]}}]}, "'big' is not one of teacher, large"),
        ({"arms": [{"paper": {"sizes": []}}]}, "expected {teachers: [MODEL, ...]}"),
        ({"models": {"student": {"source": "tiny:student"}}}, "needs models called `student` and"),
        ({"pools": {"labels": 40, "split": []}}, "pools.split=[] has 0 parts, but the paper's"),
        (
            {"arms": ["cold_grpo"], "hypotheses": "paper"},
            "hypotheses: paper needs the paper's arms",
        ),
        (
            {
                "hypotheses": {
                    "mine": {"statement": "?", "claims": [{"better": "x", "than": "bridge"}]}
                }
            },
            "hypotheses.mine.claims[0].better: 'x' is not an arm",
        ),
        (
            {"map": {"rule": "bridge", "against": "cold", "students": ["student"], "labels": [8]}},
            "map.against: 'cold' is not an arm",
        ),
        (
            {
                "map": {
                    "rule": "bridge",
                    "against": "cold_grpo",
                    "students": "teacher",
                    "labels": [8],
                }
            },
            "map.students = 'teacher': input should be a valid tuple",
        ),
        (
            {"map": {"rule": "bridge", "against": "cold_grpo", "students": ["x"], "labels": [8]}},
            "map.students: 'x' is not one of",
        ),
        (
            {
                "map": {
                    "rule": "half_split",
                    "against": "cold_grpo",
                    "students": ["student"],
                    "labels": [8],
                }
            },
            "map: grpo reads pool '1H', but the map sets the number of `labels`",
        ),
        (
            {
                "map": {
                    "rule": "bridge",
                    "against": "cold_grpo",
                    "students": ["student"],
                    "labels": [80],
                }
            },
            "pool 'labels:80': expected labels:N with N from 1 to 40",
        ),
    ],
)
def test_what_cannot_be_written_out_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_recipe(plain(**changes))
    assert words in str(caught.value)


def test_every_hypothesis_of_the_paper_passes_its_own_contrasts() -> None:
    study = prepare_study(validate_recipe(plain(hypotheses="paper")))
    assert list(study.recipe.hypotheses) == ["H1", "H2", "H3", "H4", "H5", "H6", "H7"]
    without = plain(hypotheses="paper", pools={"labels": 40})
    assert prepare_study(validate_recipe(without)).recipe.hypotheses == study.recipe.hypotheses


def test_hypotheses_without_their_arms_are_left_out() -> None:
    recipe = validate_recipe(plain(arms=["cold_grpo", "bridge", "raw_bridge"], hypotheses="paper"))
    assert list(recipe.hypotheses) == ["H1", "H2"]


def test_a_contrast_that_two_hypotheses_share_is_one_comparison() -> None:
    claim = {"better": "bridge", "than": "cold_grpo", "differs_in": ["teacher", "transfer"]}
    recipe = validate_recipe(
        plain(arms=["cold_grpo", "bridge", "raw_bridge"], hypotheses="paper", contrasts=[claim])
    )
    assert len(recipe.comparisons) == 2


# --- the map -------------------------------------------------------------------------------------

MAP = {
    "rule": "bridge",
    "against": "cold_grpo",
    "students": ["student", "other"],
    "labels": [4, 40],
}


def mapped() -> dict[str, Any]:
    data = plain(arms=["bridge", "cold_grpo"], map=MAP)
    data["models"]["other"] = {"source": "tiny:small"}
    return data


def test_the_map_has_its_arms_for_every_cell() -> None:
    recipe = validate_recipe(mapped())
    assert list(recipe.arms) == [
        "bridge",
        "cold_grpo",
        "base.student",
        "bridge.student.4",
        "cold_grpo.student.4",
        "bridge.student.40",
        "cold_grpo.student.40",
        "base.other",
        "bridge.other.4",
        "cold_grpo.other.4",
        "bridge.other.40",
        "cold_grpo.other.40",
    ]
    assert chains(recipe, "bridge.other.4") == (
        ["grpo(labels:4)"],
        ["warmup(prompts)", "opd(prompts)"],
    )
    assert chains(recipe, "cold_grpo.other.4") == ([], ["grpo(labels:4)"])
    assert recipe.arms["bridge.other.4"].student_model == "other"


def test_cells_share_their_teacher_and_read_the_first_labels() -> None:
    study = prepare_study(validate_recipe(mapped()))
    teachers = {plan.arm: plan.teacher for plan in study.graph.arms}
    assert teachers["bridge.other.4"] == teachers["bridge.student.4"]
    assert teachers["bridge.student.40"] != teachers["bridge.student.4"]
    node = next(node for node in study.graph.nodes.values() if node.pool == "labels:4")
    assert study.problems_of(node) == study.pools["labels"][:4]
    assert [label.problem_id for label in study.labels_of(node) or ()] == [
        problem.id for problem in study.pools["labels"][:4]
    ]


def test_a_written_out_recipe_reads_back_the_same(tmp_path: Path) -> None:
    data = mapped()
    data["hypotheses"] = "paper"
    recipe = validate_recipe(data)
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
