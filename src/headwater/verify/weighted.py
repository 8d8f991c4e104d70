"""Several reward functions as one: the weighted sum of what they return."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from headwater.verify.reward_calls import accepted_names


class WeightedRewards:
    """A reward function that returns, for each completion, the sum of weight times reward.

    Functions may be async, and are then awaited together. A function's None leaves it out of that
    completion's sum; where all return None, so does this.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None
    ) -> None:
        self.functions = tuple(functions)
        self.weights = (1.0,) * len(self.functions) if weights is None else tuple(weights)
        self._accepted = [accepted_names(function) for function in self.functions]

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The sums. Raises ValueError where a function returns not one number a completion."""
        given = {"prompts": prompts, "completions": completions, **columns}
        returned = [
            function(**{k: v for k, v in given.items() if accepted is None or k in accepted})
            for function, accepted in zip(self.functions, self._accepted, strict=True)
        ]
        rewards = await asyncio.gather(*map(_awaited, returned))
        for function, found in zip(self.functions, rewards, strict=True):
            if len(found) != len(completions):
                raise ValueError(f"{function} returned {len(found)} for {len(completions)}")
        return [self._sum(found) for found in zip(*rewards, strict=True)]

    def _sum(self, found: Sequence[float | None]) -> float | None:
        counted = [w * float(r) for w, r in zip(self.weights, found, strict=True) if r is not None]
        return sum(counted) if counted else None


async def _awaited(found: Any) -> Any:
    return await found if inspect.isawaitable(found) else found
