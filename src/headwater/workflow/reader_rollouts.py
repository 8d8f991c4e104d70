"""The rollouts that a warmup or sample_sft reads, and what of any settings names a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from headwater.config.stages import OutsideRolloutsStage, TeacherRolloutsStage
from headwater.config.teachers import OutsideTeacher

#: Settings that decide how a stage is computed, not what it computes.
_NOT_HASHED = frozenset(
    {"checkpoint_seconds", "micro_batch_tokens", "prompts_per_batch", "batch_prompts"}
)
#: The same of a teacher from outside; of cached rollouts their content counts, not their place.
_NOT_HASHED_OF_TEACHER = frozenset(
    {"key_variable", "requests_in_flight", "request_seconds", "path"}
)
_OUTSIDE: TypeAdapter[Any] = TypeAdapter(OutsideTeacher)


@dataclass(frozen=True, slots=True)
class RolloutsStage:
    """The settings of a stage that gives rollouts; outside: the name of a teacher from outside."""

    config: dict[str, Any]
    outside: str | None


def rollouts_stage(reader: Mapping[str, Any], sampling: Mapping[str, Any]) -> RolloutsStage:
    """The stage that gives a reader its rollouts, drawn with `sampling`."""
    config = {
        "rollouts_per_prompt": reader["teacher_rollouts_per_prompt"],
        "targets": reader.get("targets"),
        "sampling": dict(sampling),
    }
    if reader["rollouts"] is None:
        stage = TeacherRolloutsStage.model_validate(config)
        return RolloutsStage(stage.model_dump(mode="json"), None)
    outside = _OUTSIDE.validate_python(reader["rollouts"])
    served = OutsideRolloutsStage.model_validate({**config, "teacher": outside})
    return RolloutsStage(served.model_dump(mode="json"), outside.name)


def hashed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's settings decides its result."""
    found = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    if isinstance(teacher := found.get("teacher"), Mapping):
        found["teacher"] = {k: v for k, v in teacher.items() if k not in _NOT_HASHED_OF_TEACHER}
    return found
