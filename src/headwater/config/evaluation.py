"""How models are evaluated: attempts, and how they are drawn where nothing is trained on them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from headwater.config.base import Settings
from headwater.config.stages import Sampling


class EvaluationSampling(Sampling):
    """How responses are drawn where nothing is trained on them.

    temperature 0 takes the likeliest token (greedy decoding). top_p: only the likeliest tokens
    that together have this probability; top_k: only so many of the likeliest.
    """

    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: PositiveInt | None = None

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> Self:
        if self.temperature == 0.0 and (self.top_p < 1.0 or self.top_k is not None):
            raise ValueError(
                "temperature 0 always takes the likeliest token; remove top_p and top_k, or set a "
                "temperature above 0"
            )
        return self

    def problem_with(self, attempts: int) -> str | None:
        """What is wrong with so many attempts drawn in this way, or None."""
        if self.temperature > 0.0 or attempts == 1:
            return None
        return (
            f"{attempts} attempts at temperature 0 would all be the same response; set attempts "
            "to 1, or a temperature above 0"
        )


class Evaluation(Settings):
    """avg@k on every evaluation set; `problems` caps each set (the first n by seeded order)."""

    attempts: PositiveInt = 16
    problems: PositiveInt | None = None
    sampling: EvaluationSampling | None = None
    batch_prompts: PositiveInt = 64

    @model_validator(mode="after")
    def _attempts_differ(self) -> Self:
        wrong = None if self.sampling is None else self.sampling.problem_with(self.attempts)
        if wrong is not None:
            raise ValueError(wrong)
        return self
