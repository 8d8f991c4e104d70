"""What a model is given to read: prompts, and how long the responses after them may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwater.types import Problem


@dataclass(frozen=True, slots=True)
class Reading:
    """Problems that a model will read, and what comes after each.

    where: the pool or evaluation set. responses: worked responses in the problems' order;
    where there are any, they take the place of `max_new_tokens` sampled tokens.
    """

    where: str
    problems: tuple[Problem, ...]
    max_new_tokens: int = 0
    responses: tuple[str, ...] = field(default=(), repr=False)
