"""Arms: routes for the labels, as chains of stages in a short grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from headwater.config.base import Settings
from headwater.config.distillation import _tuple

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]


class ChainItem(Settings):
    """One stage of a chain: its kind, its pool, and the settings that differ from the default.

    Written `grpo`, `{grpo: 1H}` or `{grpo: {pool: 1H, steps: 50}}`.
    """

    kind: Literal["pretrain", "sft", "grpo", "warmup", "sample_sft", "opd", "mixed"]
    pool: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)


def _chain_item(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Mapping) and len(value) == 1 and "kind" not in value:
        ((kind, body),) = value.items()
        if body is None:
            return {"kind": kind}
        if isinstance(body, str):
            return {"kind": kind, "pool": body}
        if isinstance(body, Mapping):
            rest = {k: v for k, v in body.items() if k != "pool"}
            return {"kind": kind, "pool": body.get("pool"), "overrides": rest}
    return value


Chain = Annotated[
    tuple[Annotated[ChainItem, BeforeValidator(_chain_item)], ...], BeforeValidator(_tuple)
]


class Arm(Settings):
    """A route for the labels: what trains the teacher, then what trains the student.

    An arm without `student` is evaluated on its teacher. An empty chain is the base model.
    """

    title: Annotated[str, Field(max_length=200)] | None = None
    teacher: Chain | None = None
    student: Chain | None = None
    teacher_model: Name = "teacher"
    student_model: Name = "student"

    @property
    def evaluates(self) -> Literal["teacher", "student"]:
        """Which of the two models this arm's row is about."""
        return "teacher" if self.student is None else "student"

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.teacher is None and self.student is None:
            raise ValueError("an arm needs a `teacher` or a `student` chain (it may be empty: [])")
        return self
