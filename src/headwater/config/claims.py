"""What a study claims: contrasts of two arms, hypotheses made of them, and the map."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from headwater.config.arms import Name
from headwater.config.base import Settings
from headwater.config.distillation import _tuple

Account = Literal["labels", "verifier_calls", "generated_tokens", "updates"]


def cell_arm(template: str, student: str, labels: int) -> str:
    """Name of the arm that stands for an arm of the map in one of its cells."""
    return f"{template}.{student}.{labels}"


def base_arm(student: str) -> str:
    """Name of the arm that is the untrained student of a map's cells."""
    return f"base.{student}"


class Contrast(Settings):
    """`better` is expected to do better than `than`, and differs from it in what it says.

    differs_in: aspects (see `headwater.workflow.contrasts.ASPECTS`) or single settings as
    KIND.KEY, such as grpo.lr. None lets the arms' make-up differ, and no setting.
    match: accounts on which `than` is made to spend what `better` spends, by an arm of its own.
    not_worse_by: the claim is only that `better` is not behind by this share or more.
    """

    better: Name
    than: Name
    differs_in: Annotated[tuple[str, ...], BeforeValidator(_tuple)] | None = None
    match: Account | None = None
    not_worse_by: PositiveFloat | None = None


class Hypothesis(Settings):
    """A statement that holds if all of its claims do, and fails if one of them is reversed."""

    statement: Annotated[str, Field(max_length=2_000)]
    claims: Annotated[tuple[Contrast, ...], BeforeValidator(_tuple), Field(min_length=1)]


class MapSpec(Settings):
    """Where `rule` beats `against`: both arms anew for every student and number of labels.

    students: names of models that take the student's place. labels: how many of the pool
    `labels` every stage of the two arms may read.
    """

    rule: Name
    against: Name
    students: Annotated[tuple[Name, ...], BeforeValidator(_tuple), Field(min_length=1)]
    labels: Annotated[tuple[PositiveInt, ...], BeforeValidator(_tuple), Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in ("students", "labels"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"map.{key}={list(values)} repeats a value; give each once")
        return self
