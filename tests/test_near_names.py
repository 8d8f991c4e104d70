"""Misspelt names in a recipe, at any depth: the message has the one that was meant."""

from __future__ import annotations

import pytest

from headwater.config.loading import load_recipe
from headwater.errors import InputError
from headwater.recipes import find_recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.grop.steps=3", "stages.grop: unknown key; did you mean 'grpo'?"),
        ("stages.grpo.kl.coeficient=0.1", "did you mean 'coefficient'?"),
        ("stages.grpo.normalization=tokn", "'constant'; did you mean 'token'?"),
        (
            "stages.opd.kl=reverze",
            "stages.opd.kl = 'reverze': expected one of 'reverse', 'forward', 'mixed'; "
            "did you mean 'reverse'?",
        ),
        # A key of one member of a union, which its kind names.
        ("stages.opd.kl={kind: mixed, forward_wieght: 0.3}", "did you mean 'forward_weight'?"),
        ("stages.warmup.targets={kind: top_k, kk: 3}", "did you mean 'k'?"),
        ("arms.x={teacher: [grop]}", "; did you mean 'grpo'?"),
        ("arms.x={teacher: [{grpo: {kl: {estimater: k3}}}]}", "did you mean 'estimator'?"),
        ("arms.x={teacher: [{grpo: labls}]}", "did you mean 'labels'?"),
        ("arms.x={teacher: [grpo], teacher_model: techer}", "did you mean 'teacher'?"),
        ("arms.student={studnet: [grpo]}", "did you mean 'student'?"),
        ("models.student.source=prune:techer", "did you mean 'teacher'?"),
        ("models.student.prepare=[pretrian]", "did you mean 'pretrain'?"),
        ("contrasts=[{better: briddge, than: cold_grpo}]", "is not an arm; did you mean 'bridge'?"),
        ("contrasts=[{better: bridge, then: cold_grpo}]", "did you mean 'than'?"),
        ("hypotheses={a: {statment: x, claims: []}}", "did you mean 'statement'?"),
        ("arms=[{paper: {teachers: [techer]}}]", "did you mean 'teacher'?"),
        ("profile={x: {}}", "profile: unknown key; did you mean 'profiles'?"),
        ("evaluation.sampling.temprature=1", "did you mean 'temperature'?"),
        ("compute.device=cdua", "did you mean 'cuda'?"),
    ],
)
def test_a_misspelt_name_comes_with_the_one_that_was_meant(override: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(find_recipe("quickstart"), [override])
    assert any(words in line for line in str(refused.value).split("\n")), str(refused.value)


def test_a_key_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="frob: unknown key; known keys: arms, budget, compute"):
        load_recipe(find_recipe("quickstart"), ["frob=1"])
    with pytest.raises(InputError, match=r"'frob' is not an arm; choose from base_student, "):
        load_recipe(find_recipe("quickstart"), ["contrasts=[{better: frob, than: bridge}]"])
