"""The common axis on which the rows of a table draw their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from headwater.report.results import DifferenceRow, Row

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5)
_TICKS_AT_MOST = 8
_LABELS_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """From low to high, both shares, with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @property
    def labelled(self) -> tuple[float, ...]:
        """The ticks that have room for a label: all of them, or every other one."""
        return self.ticks if len(self.ticks) <= _LABELS_AT_MOST else self.ticks[::2]

    def position(self, value: float) -> float:
        """Where a share lies between low (0) and high (1), kept within them."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def scale_of(rows: Iterable[Row]) -> Scale:
    """The narrowest round scale that holds every interval, mean and seed of these rows."""
    values = [value for row in rows for value in (*row.interval, row.avg_at_k, *row.per_seed)] or [
        0.0,
        1.0,
    ]
    return _round_scale(min(values), max(values), lowest=0, highest=1)


def difference_scale(differences: Iterable[DifferenceRow]) -> Scale:
    """The narrowest round scale that holds zero and every interval of these differences."""
    values = [value for row in differences for value in (*row.interval, row.difference)]
    return _round_scale(min(values, default=0.0), max(values, default=0.0), lowest=-1, highest=1)


def _round_scale(low: float, high: float, *, lowest: int, highest: int) -> Scale:
    if lowest < 0:
        low, high = min(low, 0.0), max(high, 0.0)
    for step in _STEPS:
        first = max(round(lowest / step), math.floor(low / step + 1e-9))
        last = min(round(highest / step), max(math.ceil(high / step - 1e-9), first + 1))
        first = min(first, last - 1)
        if last - first < _TICKS_AT_MOST:
            break
    ticks = tuple(round(index * step, 10) for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)
