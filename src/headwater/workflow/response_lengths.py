"""How long responses are, and what the longest of a batch costs: a batch ends with it.

Lengths are taken to fall off exponentially up to the limit, with the mean that was given: one
parameter, a long tail, and a point mass of truncated responses at the limit. That is assumed, not
measured; with no mean given every response is as long as it may get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

#: A scale beyond which responses are as good as all truncated.
_NO_END = 1e6
_CUTS = 64


@dataclass(frozen=True, slots=True)
class ResponseLengths:
    """Tokens of a response: `mean` on average, never more than `longest`."""

    mean: float
    longest: int

    @property
    def scale(self) -> float:
        """Decay length of the exponential whose mean, cut off at `longest`, is `mean`; tokens."""
        return _scale(self.mean, self.longest)

    def under_way(self, position: float) -> float:
        """Share of responses that are longer than `position` tokens."""
        if position >= self.longest:
            return 0.0
        return 1.0 if math.isinf(self.scale) else math.exp(-position / self.scale)

    def longest_of(self, rows: float) -> float:
        """Expected tokens of the longest of so many responses: steps that their batch takes.

        The integral of 1 - (1 - share under way)^rows, by the midpoints of `_CUTS` pieces that
        grow with the position.
        """
        if rows <= 0:
            return 0.0
        if math.isinf(self.scale):
            return float(self.longest)
        scale, total = self.scale, 0.0
        for start, end in self.pieces():
            share = math.exp(-(start + end) / 2 / scale)
            total += (end - start) * -math.expm1(rows * math.log1p(-min(share, 1 - 1e-12)))
        return total

    def pieces(self) -> list[tuple[float, float]]:
        """The positions from 0 to `longest` in pieces, finer at the beginning."""
        edges = [self.longest * (index / _CUTS) ** 2 for index in range(_CUTS + 1)]
        return list(pairwise(edges))

    def utilisation(self, rows: float) -> float:
        """Mean share of a batch's rows that are under way until its last one ends."""
        return min(1.0, self.mean / max(self.longest_of(rows), 1e-9)) if rows > 0 else 1.0


@cache
def _scale(mean: float, longest: int) -> float:
    """By bisection: the mean grows with the scale."""
    if mean >= longest * (1 - 1e-9):
        return math.inf
    low, high = 1e-9, longest * _NO_END
    for _ in range(200):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-longest / middle) < mean:
            low = middle
        else:
            high = middle
    return high
