"""Completions of chosen training steps, from the rollouts a stage keeps anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

_COLUMNS = ("step", "prompt", "response", "reward", "advantage")


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as trackers and terminals show it; step counts from 1.

    reward and advantage are None where nothing is graded; the advantage is None as well in
    rollouts that were kept before it was.
    """

    step: int
    prompt: str
    completion: str
    reward: float | None
    advantage: float | None

    def row(self) -> dict[str, Any]:
        """Columns by name."""
        return asdict(self)


def read_completions(
    paths: Sequence[Path], wanted: Callable[[int], bool]
) -> dict[int, list[Completion]]:
    """Completions by step (from 1) of the steps that `wanted` says; files in the order of steps.

    Raises OSError, KeyError or pyarrow's errors for a file that is no such table, or is not
    wholly written yet.
    """
    found: dict[int, list[Completion]] = {}
    for path in paths:
        for row in _rows(path, wanted):
            step = row["step"] + 1
            found.setdefault(step, []).append(
                Completion(
                    step, row["prompt"], row["response"], row["reward"], row.get("advantage")
                )
            )
    return found


def last_step(path: Path) -> int | None:
    """The last step (from 1) that a file of rollouts has; None where it has none."""
    steps = parquet.read_table(path, columns=["step"]).column("step").to_pylist()
    return max(steps) + 1 if steps else None


def _rows(path: Path, wanted: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    """Rows of the wanted steps, some thousands in memory at a time."""
    with parquet.ParquetFile(path) as file:
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=names):
            keep = pa.array([wanted(step + 1) for step in batch.column("step").to_pylist()])
            yield from batch.filter(keep).to_pylist()
