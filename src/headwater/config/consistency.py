"""Whether the parts of a recipe fit each other: what is wrong, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from headwater.config.arms import ChainItem
from headwater.config.explain import explain
from headwater.config.stages import STAGE_MODELS
from headwater.near_names import choose, near

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe


def task_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, source in recipe.task.eval.items():
        if not source.startswith("pool:"):
            continue
        if source != "pool:validation" or not recipe.pools.validation:
            found.append(
                f"task.eval.{name}={source}: expected pool:validation with pools.validation set; "
                "no other pool is kept from training"
            )
    if recipe.task.worked is not None and not recipe.pools.worked:
        found.append("task.worked is given but pools.worked is 0; say how many to take")
    return found


def model_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, spec in recipe.models.items():
        if spec.source.startswith("prune:"):
            parent = spec.source.removeprefix("prune:")
            if parent not in recipe.models or parent == name:
                found.append(
                    f"models.{name}.source={spec.source}: expected prune:MODEL with MODEL one of "
                    f"{sorted(set(recipe.models) - {name})}{near(parent, recipe.models)}"
                )
            if spec.layers is None:
                found.append(f"models.{name}: prune: needs `layers` (how many to keep, or which)")
            found += _prune_circle(recipe, name)
        elif spec.layers is not None:
            found.append(f"models.{name}.layers: only prune: sources take `layers`; remove it")
        for index, item in enumerate(spec.prepare):
            where = f"models.{name}.prepare[{index}]"
            if item.kind not in ("pretrain", "sft"):
                found.append(f"{where}: {item.kind} cannot prepare a base; use pretrain or sft")
            found += _item_problems(recipe, item, where)
    return found


def _prune_circle(recipe: Recipe, name: str) -> list[str]:
    """A line where following parents from a model leads back to it by way of others."""
    way = [name]
    while way[-1] in recipe.models and len(way) <= len(recipe.models):
        prefix, _, parent = recipe.models[way[-1]].source.partition(":")
        if prefix != "prune":
            return []
        way.append(parent)
        if parent == name:
            break
    if way[-1] != name or len(way) < 3:  # another's circle, or a parent that does not exist
        return []
    return [
        f"models.{name}.source: pruned from itself ({' -> '.join(way)}); start the circle from a "
        "model with weights of its own"
    ]


def _item_problems(recipe: Recipe, item: ChainItem, where: str) -> list[str]:
    found = []
    pool = recipe.pool(item)
    wrong = None if pool is None else recipe.pools.problem_with(pool)
    if wrong is not None:
        found.append(f"{where}: {wrong}")
    pool = None if pool is None else pool.partition(":")[0]
    if item.kind == "pretrain" and item.pool is not None:
        found.append(
            f"{where}: pretrain makes its own traces and reads no pool, but is given "
            f"{item.pool!r}; remove it, or use sft to train on a pool"
        )
    if pool == "validation":
        found.append(f"{where}: pool 'validation' is kept from training; use another")
    if item.kind in ("grpo", "mixed") and pool in ("prompts", "worked"):
        found.append(
            f"{where}: {item.kind} cannot read pool {pool!r}, which has no labels; use labels"
        )
    try:
        recipe.stage(item)
    except ValidationError as error:
        model = STAGE_MODELS[item.kind]
        found += [f"{where}.{item.kind}: {explain(model, problem)}" for problem in error.errors()]
    return found


def arm_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, arm in recipe.arms.items():
        for role, (model, chain) in arm.models.items():
            if model not in recipe.models:
                key = f"{role}.model" if role.startswith("teachers.") else f"{role}_model"
                found.append(
                    f"arms.{name}: model {model!r} is not one of {sorted(recipe.models)}; "
                    f"add it under `models` or set {key}{near(model, recipe.models)}"
                )
            for index, item in enumerate(chain):
                where = f"arms.{name}.{role}[{index}]"
                wrong = _item_problems(recipe, item, where)
                found += wrong
                if item.kind == "pretrain":
                    found.append(f"{where}: pretrain belongs under models.NAME.prepare")
                alone = role != "student" or arm.teacher is None
                if alone and not wrong and recipe.learns_from_arm(item):
                    found.append(
                        f"{where}: {item.kind} needs a teacher; use it in a student chain and "
                        "give the arm a teacher chain (`teacher: []` is the raw teacher)"
                    )
    return found


def contrast_problems(recipe: Recipe) -> list[str]:
    found = []
    named = [(f"contrasts[{index}]", one) for index, one in enumerate(recipe.contrasts)]
    for name, hypothesis in recipe.hypotheses.items():
        named += [
            (f"hypotheses.{name}.claims[{index}]", one)
            for index, one in enumerate(hypothesis.claims)
        ]
    for where, contrast in named:
        if contrast.better == contrast.than:
            found.append(f"{where}: {contrast.better!r} is compared with itself; name two arms")
        for side, arm in (("better", contrast.better), ("than", contrast.than)):
            if arm not in recipe.arms:
                found.append(
                    f"{where}.{side}: {arm!r} is not an arm; {choose(arm, sorted(recipe.arms))}"
                )
    return found


def map_problems(recipe: Recipe) -> list[str]:
    spec = recipe.map
    if spec is None:
        return []
    found = [
        f"map.{role}: {getattr(spec, role)!r} is not an arm; "
        f"{choose(getattr(spec, role), sorted(recipe.arms))}"
        for role in ("rule", "against")
        if getattr(spec, role) not in recipe.arms
    ]
    found += [
        f"map.students: {student!r} is not one of {sorted(recipe.models)}; add it under `models`"
        f"{near(student, recipe.models)}"
        for student in spec.students
        if student not in recipe.models
    ]
    return found
