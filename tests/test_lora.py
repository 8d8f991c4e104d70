"""Adapters in a recipe: the short form, what is refused, which stages have them and their base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.machinery import PathFinder
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from headwater.config.loading import load_recipe
from headwater.config.lora import LoRA
from headwater.config.recipe import Recipe
from headwater.config.stages import GRPOStage, PretrainStage
from headwater.errors import InputError
from headwater.recipes import find_recipe
from headwater.workflow import node_settings
from headwater.workflow.graph import Graph, StageNode
from headwater.workflow.prepare import prepare_study

SMALL = {
    "name": "small",
    "task": {
        "train": "task:arithmetic?steps=1-2&count=60&seed=3",
        "eval": {"held_out": "task:arithmetic?steps=1-2&count=5&seed=4"},
        "prompt": "bare",
    },
    "models": {
        "teacher": {"source": "tiny:teacher", "prepare": ["pretrain"]},
        "student": {"source": "tiny:student", "prepare": ["pretrain"], "lora": 8},
    },
    "pools": {"labels": 16, "prompts": 16},
    "diagnostics": {"prompts": 0},
    "arms": {
        "cold": {"student": ["grpo"]},
        "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd", "grpo"]},
    },
}


def _recipe(**changes: Any) -> Recipe:
    plain = copy.deepcopy(SMALL)
    for key, value in changes.items():
        at: Any = plain
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return Recipe.model_validate(plain)


def _graph(**changes: Any) -> Graph:
    return prepare_study(_recipe(**changes)).graph


def _chain(graph: Graph, arm: str, role: str = "student") -> list[StageNode]:
    """The stages of an arm's model, first to last."""
    plan = next(plan for plan in graph.arms if plan.arm == arm)
    found, at = [], getattr(plan, role)
    while at is not None:
        found.append(graph.nodes[at])
        at = graph.nodes[at].model
    return found[::-1]


# --- settings -------------------------------------------------------------------------------------


def test_a_number_is_a_rank_and_alpha_is_twice_it() -> None:
    expected = LoRA(rank=8, alpha=16, target_modules="all-linear", dropout=0.0, base="full")
    assert LoRA.model_validate(8) == LoRA(rank=8) == expected
    assert LoRA.model_validate({}) == LoRA(rank=16, alpha=32)
    assert LoRA(rank=8, alpha=None) == expected
    assert LoRA(target_modules=["q_proj"]).target_modules == ("q_proj",)
    again = LoRA.model_validate(LoRA(rank=4, alpha=5).model_dump(mode="json"))
    assert (again.rank, again.alpha) == (4, 5)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"dropout": 0.1}, r"lora: dropout=0.1: adapters are merged .* expected 0: remove it"),
        ({"rank": 0}, r"models.student.lora.rank = 0: input should be greater than 0"),
        ({"rnak": 4}, r"models.student.lora.rnak: unknown key; did you mean 'rank'\?"),
        ({"target_modules": []}, r"target_modules=\[\] adapts nothing.* name some, or remove lora"),
        ({"target_modules": ["lm_head"]}, r"target_modules.*lm_head.*'q_proj'"),
        (
            {"base": "nf4", "target_modules": ["q_proj"]},
            r"nf4 with target_modules=\['q_proj'\].*expected all-linear: set it, or base: full",
        ),
    ],
)
def test_what_is_refused(lora: Mapping[str, Any], said: str, tmp_path: Any) -> None:
    plain = copy.deepcopy(SMALL)
    plain["models"]["student"]["lora"] = lora  # type: ignore[index]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_stage_says_adapters_none_or_nothing() -> None:
    assert GRPOStage().lora is None
    assert GRPOStage(lora=False).lora is False
    assert GRPOStage(lora=4).lora == LoRA(rank=4)
    assert GRPOStage.model_validate(GRPOStage(lora=False).model_dump(mode="json")).lora is False
    with pytest.raises(ValidationError, match=r"lora of rank 4: pretrain .* remove lora here"):
        PretrainStage(lora=4)


def test_nf4_on_ranks_is_refused_where_it_is_set() -> None:
    ranks = {"compute__ranks": 2}
    assert _recipe(**ranks).models["student"].lora is not None
    with pytest.raises(ValidationError, match=r"models.student.lora.base: nf4 with compute.ranks"):
        _recipe(**ranks, models__student__lora={"base": "nf4"})
    chain = {"teacher": [{"grpo": {"lora": {"base": "nf4"}}}], "student": ["opd"]}
    with pytest.raises(ValidationError, match=r"arms.bridge.teacher\[0\].grpo.lora.base: nf4"):
        _recipe(**ranks, arms__bridge=chain)


def test_set_on_the_command_line() -> None:
    recipe = load_recipe(find_recipe("quickstart"), overrides=["models.student.lora.rank=8"])
    assert recipe.models["student"].lora == LoRA(rank=8)
    assert recipe.models["teacher"].lora is None
    prepare_study(recipe)  # its contrasts still compare like with like


# --- stages of a study ----------------------------------------------------------------------------


def test_a_models_adapters_are_its_arms_not_its_preparations() -> None:
    with_lora, without = _graph(), _graph(models__student__lora=None)
    expected = LoRA(rank=8).model_dump(mode="json")
    source, pretrain, *trained = _chain(with_lora, "bridge")
    assert "lora" not in source.config and "lora" not in pretrain.config
    assert [node.config["lora"] for node in trained] == [expected] * 3
    assert trained[0].settings().lora == LoRA(rank=8)  # type: ignore[attr-defined]
    assert [n.fingerprint for n in _chain(without, "bridge")][:2] == [
        source.fingerprint,
        pretrain.fingerprint,
    ]
    teachers = [
        [n.fingerprint for n in _chain(g, "bridge", "teacher")] for g in (with_lora, without)
    ]
    assert teachers[0] == teachers[1] and len(teachers[0]) == 3
    assert all("lora" not in node.config for node in without.nodes.values())
    assert all(node.base is None for node in without.nodes.values())


def test_a_chain_goes_on_with_one_adapter_until_it_changes() -> None:
    _, pretrain, warmup, opd, grpo = _chain(_graph(), "bridge")
    assert [n.base for n in (warmup, opd, grpo)] == [pretrain.fingerprint] * 3
    assert grpo.parents == (opd.fingerprint, pretrain.fingerprint)
    assert grpo.options == {"base_name": f"artifacts/{pretrain.fingerprint}/model"}
    other = {"teacher": ["grpo"], "student": ["warmup", {"opd": {"lora": 4}}, "grpo"]}
    _, pretrain, warmup, opd, grpo = _chain(_graph(arms__bridge=other), "bridge")
    assert [n.base for n in (warmup, opd, grpo)] == [
        pretrain.fingerprint,
        warmup.fingerprint,
        opd.fingerprint,
    ]
    off = {"teacher": ["grpo"], "student": ["warmup", {"opd": {"lora": False}}, "grpo"]}
    _, _, _, opd, grpo = _chain(_graph(arms__bridge=off), "bridge")
    assert "lora" not in opd.config and opd.base is None
    assert grpo.base == opd.fingerprint


def test_a_hub_models_adapter_names_the_hub() -> None:
    graph = _graph(models__student={"source": "hf:Some/Model", "lora": 8})
    assert _chain(graph, "cold")[-1].options == {"base_name": "Some/Model"}


def test_a_contrast_of_lora_with_full_training_names_it() -> None:
    arms = {"arms__full": {"student": [{"grpo": {"lora": False}}]}}
    contrast = {"better": "cold", "than": "full", "differs_in": []}
    with pytest.raises(InputError, match=r"grpo.lora is .*'rank': 8.* in cold and None in full"):
        _graph(**arms, contrasts=[contrast])
    _graph(**arms, contrasts=[contrast | {"differs_in": ["grpo.lora"]}])


def test_a_missing_package_is_said_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(name: str) -> object:
        return None if name == "bitsandbytes" else PathFinder.find_spec("json")

    monkeypatch.setattr(node_settings, "find_spec", found)
    node_settings.require_adapter_packages(_graph())
    with pytest.raises(InputError, match=r"package bitsandbytes is not .*'headwater\[peft\]'"):
        _graph(models__student__lora={"base": "nf4"})
