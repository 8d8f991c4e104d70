"""How many tokens a micro-batch has: as the settings say, and half of it when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.engine.packing import PackedGroup, micro_batches, padded_tokens


class TokenBudget:
    """The budget of one stage. It is only ever lowered, and what is lowered may divide groups."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._set = tokens

    @property
    def lowered(self) -> bool:
        """Whether memory has run out before; groups are divided from then on."""
        return self.tokens < self._set

    def lower_to(self, tokens: int) -> None:
        """Continue with the budget of a checkpoint."""
        self.tokens = min(self.tokens, tokens)

    def micro_batches(self, groups: Sequence[PackedGroup]) -> list[tuple[PackedGroup, ...]]:
        """The micro-batches of these groups."""
        return list(micro_batches(groups, self.tokens, divide=self.lowered))

    def halve(self, groups: Sequence[PackedGroup]) -> bool:
        """Half of the largest micro-batch these groups made, so that it is one no longer.

        Returns whether anything is left to divide: False where every micro-batch was one
        completion already.
        """
        made = self.micro_batches(groups)
        if all(len(micro) == 1 and len(micro[0].completions) == 1 for micro in made):
            return False
        self.tokens = max(1, min(self.tokens, max(map(padded_tokens, made))) // 2)
        return True
