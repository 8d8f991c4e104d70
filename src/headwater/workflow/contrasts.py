"""Whether a declared contrast compares like with like.

Two arms of a contrast may differ in what `differs_in` names. Which stages an arm has is what
the contrast is about; but a stage that both have must have the same settings in both, or the
difference would be between settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headwater.config.recipe import Arm, Chain, ChainItem, Contrast, Recipe
from headwater.config.stages import READS_LABELS, READS_TEACHER
from headwater.errors import InputError

ASPECTS = ("teacher", "transfer", "labels", "student", "updates")
_UPDATE_COUNTS = frozenset({"steps", "epochs", "updates_per_batch"})
_HOW_NOT_WHAT = frozenset({"checkpoint_seconds", "micro_batch_tokens"})


@dataclass(frozen=True, slots=True)
class _Difference:
    key: str
    better: Any
    than: Any
    allowed_by: tuple[str, ...]


def check_contrasts(recipe: Recipe) -> None:
    """Raises InputError with the key and both values of every difference not declared.

    Contrasts without `differs_in` declare nothing and are not checked.
    """
    lines = []
    for index, contrast in enumerate(recipe.contrasts):
        if contrast.differs_in is None:
            continue
        where = f"contrasts[{index}] ({contrast.better} against {contrast.than})"
        for aspect in contrast.differs_in:
            if aspect not in ASPECTS:
                lines.append(
                    f"{where}: differs_in {aspect!r} is not an aspect; choose from "
                    f"{', '.join(ASPECTS)}"
                )
        lines += [
            f"{where}: {found.key} is {found.better!r} in {contrast.better} and {found.than!r} in "
            f"{contrast.than}; make them equal, or add {' or '.join(found.allowed_by)} to "
            "differs_in"
            for found in _differences(recipe, contrast)
            if not set(found.allowed_by) & set(contrast.differs_in)
        ]
    if lines:
        raise InputError("\n".join(lines))


def _differences(recipe: Recipe, contrast: Contrast) -> Iterator[_Difference]:
    better, than = recipe.arms[contrast.better], recipe.arms[contrast.than]
    if better.evaluates == than.evaluates == "student":
        yield from _models(better, than)
        yield from _chains(recipe, "student", better.student or (), than.student or ())
    if better.teacher is not None and than.teacher is not None:
        yield from _chains(recipe, "teacher", better.teacher, than.teacher)


def _models(better: Arm, than: Arm) -> Iterator[_Difference]:
    if better.student_model != than.student_model:
        yield _Difference("student_model", better.student_model, than.student_model, ("student",))
    both_taught = better.teacher is not None and than.teacher is not None
    if both_taught and better.teacher_model != than.teacher_model:
        yield _Difference("teacher_model", better.teacher_model, than.teacher_model, ("teacher",))


def _chains(recipe: Recipe, role: str, better: Chain, than: Chain) -> Iterator[_Difference]:
    """Differences of the stages both chains have: the first of a kind with the first, and so on."""
    for kind in dict.fromkeys(item.kind for item in better):
        pairs = zip(
            (item for item in better if item.kind == kind),
            (item for item in than if item.kind == kind),
            strict=False,
        )
        for number, (one, other) in enumerate(pairs):
            name = f"{role} {kind}" + (f" ({number + 1})" if number else "")
            yield from _stages(recipe, role, name, one, other)


def _stages(
    recipe: Recipe, role: str, name: str, one: ChainItem, other: ChainItem
) -> Iterator[_Difference]:
    aspect = "transfer" if one.kind in READS_TEACHER else role
    pools = recipe.pool(one), recipe.pool(other)
    if pools[0] != pools[1]:
        allowed = ("labels", aspect) if one.kind in READS_LABELS | READS_TEACHER else (aspect,)
        yield _Difference(f"pool of {name}", *pools, allowed)
    settings = [recipe.stage(item).model_dump(mode="json") for item in (one, other)]
    for key in settings[0]:
        values = settings[0][key], settings[1][key]
        if key in _HOW_NOT_WHAT:
            continue
        if values[0] != values[1]:
            allowed = ("updates", aspect) if key in _UPDATE_COUNTS else (aspect,)
            yield _Difference(f"{key} of {name}", *values, allowed)
