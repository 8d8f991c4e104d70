"""The weight lambda of the verifier's reward beside a teacher's, and how it moves over a stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from headwater.config.base import Settings

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class LambdaSchedule(Settings):
    """lambda from `start` at the first step to `end` after `over` steps, and `end` from there on.

    over: by default `end` is reached with the stage's last step. schedule: a straight line, half
    a cosine, or `step`, which stays at `start` until step `over`. Written as a number where it
    stays the same.
    """

    start: _Share
    end: _Share
    schedule: Literal["linear", "cosine", "step"] = "linear"
    over: PositiveInt | None = None

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if self.schedule == "step" and self.over is None:
            raise ValueError(
                "schedule: step without `over`, the step from which lambda is `end`; add "
                "over: STEPS, or choose linear or cosine"
            )
        return self

    def at(self, step: int, steps: int) -> float:
        """lambda at a step (from 0) of a stage of `steps` steps.

        >>> [LambdaSchedule(start=0.0, end=1.0).at(step, 5) for step in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
        """
        done = step / (self.over or max(steps - 1, 1))
        if self.start == self.end or done >= 1.0:
            return self.end
        if self.schedule == "step":
            return self.start
        if self.schedule == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + (self.end - self.start) * done


def _constant(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"start": value, "end": value}
    if not isinstance(value, Mapping | LambdaSchedule):
        raise ValueError(
            f"found {value!r}; expected a weight; write a number from 0 to 1, or "
            "{start: 0, end: 1}"
        )
    return value


Lambda = Annotated[LambdaSchedule, BeforeValidator(_constant)]
