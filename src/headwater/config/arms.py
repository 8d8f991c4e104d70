"""Arms: routes for the labels, as chains of stages in a short grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from headwater.config.base import Settings
from headwater.config.distillation import _tuple

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
#: What `Problem.source` says of a problem.
Source = Annotated[str, Field(min_length=1, max_length=200)]


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


class SourceTeacher(Settings):
    """A teacher for the problems of one source: a model, and the stages that train it."""

    model: Name = "teacher"
    chain: Chain = ()


class Arm(Settings):
    """A route for the labels: what trains the teacher, then what trains the student.

    An arm without `student` is evaluated on its teacher. An empty chain is the base model.
    `teachers` teach the problems of their sources (`Problem.source`), `teacher` all others.
    """

    title: Annotated[str, Field(max_length=200)] | None = None
    teacher: Chain | None = None
    student: Chain | None = None
    teacher_model: Name = "teacher"
    student_model: Name = "student"
    teachers: dict[Source, SourceTeacher] = Field(default_factory=dict)

    @property
    def models(self) -> Mapping[str, tuple[Name, Chain]]:
        """Each model that it has, and the chain that trains it, by where the arm says so."""
        own = {"teacher": (self.teacher_model, self.teacher)}
        own["student"] = (self.student_model, self.student)
        found = {role: (model, chain) for role, (model, chain) in own.items() if chain is not None}
        return found | {f"teachers.{s}": (one.model, one.chain) for s, one in self.teachers.items()}

    @property
    def evaluates(self) -> Literal["teacher", "student"]:
        """Which of the two models this arm's row is about."""
        return "teacher" if self.student is None else "student"

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.teacher is None and self.student is None:
            raise ValueError("an arm needs a `teacher` or a `student` chain (it may be empty: [])")
        if self.teachers and (self.teacher is None or self.student is None):
            raise ValueError(
                f"teachers of {', '.join(self.teachers)} in an arm without a `teacher` or without "
                "a `student`; expected both, for one teaches all other problems to the other: add "
                "them (`teacher: []` is the raw teacher), or remove `teachers`"
            )
        return self
