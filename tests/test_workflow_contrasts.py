"""Contrasts compare like with like, or the recipe is refused; matched arms spend alike."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.config.loading import load_recipe, validate_recipe, write_resolved
from headwater.errors import InputError
from headwater.workflow.matching import planned
from headwater.workflow.prepare import prepare_study
from headwater.workflow.study import Study

ARMS: dict[str, Any] = {
    "cold": {"student": ["grpo"]},
    "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]},
    "raw": {"teacher": [], "student": ["warmup", "opd"]},
    "opd_only": {"teacher": ["grpo"], "student": ["opd"]},
    "half": {
        "teacher": [{"grpo": {"pool": "1H", "steps": 5}}],
        "student": ["warmup", "opd", {"grpo": {"pool": "2H", "steps": 5}}],
    },
    "half_bridge": {
        "teacher": [{"grpo": {"pool": "1H", "steps": 5}}],
        "student": ["warmup", "opd"],
    },
    "replay": {
        "teacher": [{"grpo": {"pool": "1H", "steps": 5}}],
        "student": ["warmup", "opd", {"grpo": {"pool": "1H", "steps": 5}}],
    },
    "long": {"teacher": ["grpo"], "student": ["warmup", {"opd": {"steps": 30}}]},
    "quick": {"teacher": ["grpo"], "student": ["warmup", {"opd": {"lr": 0.5}}]},
    "short": {"student": [{"grpo": {"sampling": {"max_new_tokens": 9}}}]},
    "rich": {
        "teacher": ["grpo"],
        "student": [{"warmup": {"teacher_rollouts_per_prompt": 3}}, "opd"],
    },
    "sharp": {"student": [{"grpo": {"clip_high": 0.3}}]},
    "small": {"student": ["grpo"], "student_model": "teacher"},
    "prompts": {"teacher": ["grpo"], "student": [{"warmup": "1H"}, "opd"]},
}


def recipe(*contrasts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "study",
        "task": {
            "train": "task:arithmetic?count=150",
            "eval": {"one": "task:arithmetic?seed=3&count=9"},
        },
        "models": {"teacher": {"source": "tiny:teacher"}, "student": {"source": "tiny:student"}},
        "pools": {"labels": 40, "prompts": 100},
        "stages": {
            "grpo": {"steps": 10, "prompts_per_step": 4, "group_size": 4},
            "opd": {"steps": 8, "prompts_per_step": 4, "group_size": 2},
            "warmup": {"steps": 6, "batch_size": 8},
        },
        "sampling": {"max_new_tokens": 16},
        "arms": ARMS,
        "contrasts": list(contrasts),
        **changes,
    }


def study(*contrasts: dict[str, Any], **changes: Any) -> Study:
    return prepare_study(validate_recipe(recipe(*contrasts, **changes)))


def contrast(better: str, than: str, differs_in: list[str] | None, **more: Any) -> dict[str, Any]:
    return {"better": better, "than": than, "differs_in": differs_in, **more}


@pytest.mark.parametrize(
    ("better", "than", "differs_in"),
    [
        ("bridge", "cold", ["teacher", "transfer"]),
        ("bridge", "raw", ["teacher", "labels"]),
        ("bridge", "opd_only", ["transfer"]),
        ("half", "replay", ["labels"]),
        ("half", "half_bridge", ["student", "labels", "updates"]),
        ("half", "cold", ["teacher", "transfer"]),
        ("bridge", "half", ["teacher", "student"]),
        ("long", "bridge", ["updates"]),
        ("long", "bridge", ["opd.steps"]),
        ("sharp", "cold", ["grpo.clip_high"]),
        ("small", "cold", ["student_model"]),
        ("half", "cold", None),
    ],
)
def test_declared_differences_are_allowed(
    better: str, than: str, differs_in: list[str] | None
) -> None:
    study(contrast(better, than, differs_in))


@pytest.mark.parametrize(
    ("better", "than", "differs_in", "message"),
    [
        (
            "half",
            "replay",
            ["teacher"],
            "student pools is ['grpo(2H)'] in half and ['grpo(1H)'] in replay; make them equal, or "
            "add student or labels to differs_in",
        ),
        ("half", "replay", ["student"], "labels read is '40 of 1H, 2H' in half and '20 of 1H' in"),
        ("long", "bridge", ["transfer"], "opd.updates is 30 in long and 8 in bridge; make them"),
        ("quick", "bridge", ["transfer", "teacher"], "opd.lr is 0.5 in quick and 1e-06 in bridge"),
        ("quick", "opd_only", None, "opd.lr is 0.5 in quick and 1e-06 in opd_only"),
        ("sharp", "cold", ["student"], "grpo.clip_high is 0.3 in sharp and 0.2 in cold"),
        ("sharp", "bridge", None, "grpo.clip_high is 0.3 in sharp and 0.2 in bridge"),
        (
            "short",
            "cold",
            None,
            "grpo.sampling is {'temperature': 1.0, 'max_new_tokens': 9} in short and "
            "{'temperature': 1.0, 'max_new_tokens': 16} in cold; make them equal, or add "
            "grpo.sampling",
        ),
        (
            "rich",
            "bridge",
            ["transfer"],
            "teacher_rollouts_per_prompt is 3 in rich and 1 in bridge",
        ),
        (
            "small",
            "cold",
            ["student"],
            "model evaluated is 'teacher' in small and 'student' in cold",
        ),
        ("prompts", "bridge", ["labels"], "transfer pools is ['warmup(1H)', 'opd(prompts)'] in"),
        ("bridge", "cold", ["taecher"], "differs_in 'taecher' is not an aspect; choose from"),
    ],
)
def test_other_differences_are_refused_with_key_and_values(
    better: str, than: str, differs_in: list[str] | None, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        study(contrast(better, than, differs_in))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"contrasts[0] ({better} against {than}): ")


def test_claims_of_hypotheses_are_checked_alike() -> None:
    claims = [contrast("quick", "bridge", ["transfer"])]
    with pytest.raises(InputError, match=r"hypotheses\.mine\.claims\[0\] \(quick against bridge\)"):
        study(hypotheses={"mine": {"statement": "Quick is better.", "claims": claims}})


# --- match ---------------------------------------------------------------------------------------


def spent(made: Study, arm: str) -> dict[str, int]:
    plan = next(plan for plan in made.graph.arms if plan.arm == arm)
    found = planned(made, plan)
    return {
        name: getattr(found, name)
        for name in ("labels", "verifier_calls", "updates", "generated_tokens")
    }


def test_accounts_of_an_arm_count_what_it_shares_and_leave_out_its_base() -> None:
    made = study()
    assert spent(made, "cold") == {
        "labels": 40,
        "verifier_calls": 160,
        "updates": 10,
        "generated_tokens": 160 * 16,
    }
    # GRPO, 100 cached teacher rollouts, and 8 x 4 x 2 of the student.
    assert spent(made, "bridge") == {
        "labels": 40,
        "verifier_calls": 160,
        "updates": 24,
        "generated_tokens": (160 + 100 + 64) * 16,
    }


@pytest.mark.parametrize(("account", "steps"), [("updates", 24), ("generated_tokens", 20)])
def test_an_arm_is_made_to_spend_what_the_other_does(account: str, steps: int) -> None:
    allowed = ["teacher", "transfer", "updates"]
    made = study(contrast("bridge", "cold", allowed, match=account))
    sibling = made.recipe.contrasts[0].than
    assert sibling == f"cold.{account}-of-bridge"
    (item,) = made.recipe.arms[sibling].student or ()
    assert item.overrides["steps"] == steps
    one, other = spent(made, "bridge"), spent(made, sibling)
    assert other[account] == pytest.approx(one[account], rel=0.02)
    assert made.recipe.arms[sibling].title == f"cold, {account.replace('_', ' ')} as bridge"


def test_arms_that_spend_alike_need_no_sibling() -> None:
    made = study(
        contrast("bridge", "cold", ["teacher", "transfer"], match="labels"),
        contrast("bridge", "cold", ["teacher", "transfer"], match="verifier_calls"),
    )
    assert set(made.recipe.arms) == set(ARMS)


def test_labels_are_matched_by_reading_the_first_of_the_pool() -> None:
    made = study(
        contrast(
            "half_bridge", "cold", ["teacher", "transfer", "labels", "updates"], match="labels"
        )
    )
    sibling = made.recipe.contrasts[0].than
    (item,) = made.recipe.arms[sibling].student or ()
    assert item.pool == "labels:20"
    assert spent(made, sibling)["labels"] == 20
    node = next(n for n in made.graph.nodes.values() if n.pool == "labels:20")
    assert made.problems_of(node) == made.pools["labels"][:20]


def test_a_matched_recipe_is_written_out_and_reads_back(tmp_path: Any) -> None:
    made = study(contrast("bridge", "cold", ["teacher", "transfer", "updates"], match="updates"))
    write_resolved(made.recipe, tmp_path / "recipe.yaml")
    again = prepare_study(load_recipe(tmp_path / "recipe.yaml"))
    assert again.recipe == made.recipe
    assert set(again.graph.nodes) == set(made.graph.nodes)


@pytest.mark.parametrize(
    ("better", "than", "account", "message"),
    [
        ("raw", "cold", "verifier_calls", "raw spends none; leave out match"),
        ("cold", "raw", "verifier_calls", "none of its own stages spends any"),
        ("bridge", "half", "labels", None),
        ("half_bridge", "replay", "labels", None),
        ("half_bridge", "half", "labels", "2 of its stages read labels and one is needed"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    better: str, than: str, account: str, message: str | None
) -> None:
    wanted = contrast(better, than, None, match=account)
    if message is None:
        study(wanted)
        return
    with pytest.raises(InputError, match=f"match: {account} of {than} to {better}: ") as caught:
        study(wanted)
    assert message in str(caught.value)


def test_steps_that_do_not_come_out_even_are_refused() -> None:
    arms = {**ARMS, "tiny": {"teacher": ["grpo"], "student": [{"opd": {"steps": 3}}]}}
    stages = {"grpo": {"steps": 1, "prompts_per_step": 40, "group_size": 4}}
    with pytest.raises(InputError, match=r"would need 1\.15 steps instead of 1; choose steps"):
        study(
            contrast("tiny", "cold", None, match="generated_tokens"),
            arms={name: arms[name] for name in ("tiny", "cold")},
            stages={**stages, "opd": {"steps": 3, "prompts_per_step": 4, "group_size": 2}},
        )
