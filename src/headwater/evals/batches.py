"""Finished batches of an evaluation on disk, so that an interrupted one continues."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headwater.plain_json import parse_json
from headwater.storage import flush, sha256_of
from headwater.types import Problem

_STATE = b"headwater"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an evaluation is.

    tables: rows of the finished batches in order. problems: how many those are about.
    ledger_position, seconds: of the account and of work, when the last of them was finished.
    metrics_sha256: of their metrics.
    """

    tables: tuple[pa.Table, ...] = ()
    problems: int = 0
    ledger_position: int = 0
    seconds: float = 0.0
    metrics_sha256: str = ""


class FinishedBatches:
    """The batches of one evaluation, a file each; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, problems: Sequence[Problem], attempts: int) -> Progress:
        """What is finished of `attempts` attempts at these problems, in their order.

        Batches need not be of one size. The first file that is missing, damaged (by the hash in
        its name) or about other problems ends it; that one and those after it are removed.
        """
        progress = Progress()
        for path in sorted(self._folder.glob("batch-*.parquet")):
            found = None
            if path.name == _named(len(progress.tables), sha256_of(path)):
                found = _read(path, progress, problems, attempts)
            if found is None:
                path.unlink()
            else:
                progress = found
        return progress

    def clear(self) -> None:
        """Forget every batch: the evaluation starts over."""
        for path in self._folder.glob("batch-*.parquet"):
            path.unlink()

    def add(
        self,
        number: int,
        table: pa.Table,
        ledger_position: int,
        seconds: float,
        metrics_sha256: str = "",
    ) -> None:
        """Keep batch `number`: on disk, by one rename, on return.

        metrics_sha256: of the metrics of the batches so far.
        """
        state = json.dumps(
            {
                "ledger_position": ledger_position,
                "seconds": seconds,
                "metrics_sha256": metrics_sha256,
            }
        )
        writing = self._folder / "writing.part"
        _write(table.replace_schema_metadata({_STATE: state}), writing)
        writing.replace(self._folder / _named(number, sha256_of(writing)))
        flush(self._folder)


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet whole or not at all: beside it, flushed to disk, renamed."""
    beside = path.with_suffix(".part")
    _write(table, beside)
    beside.replace(path)


def _named(number: int, sha256: str) -> str:
    """The file name of a batch, which vouches for its content."""
    return f"batch-{number:06d}-{sha256[:32]}.parquet"


def _write(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        pq.write_table(table.combine_chunks(), file, write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())


def _read(
    path: Path, before: Progress, problems: Sequence[Problem], attempts: int
) -> Progress | None:
    """`before` with the batch in `path`; None where that is damaged or does not continue it."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        state = parse_json((table.schema.metadata or {})[_STATE])
        position, seconds = int(state["ledger_position"]), float(state["seconds"])
        metrics = str(state["metrics_sha256"])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    end = before.problems + len(table) // attempts
    asked = [(p.id, a) for p in problems[before.problems : end] for a in range(attempts)]
    given = zip(table["problem_id"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    if not asked or list(given) != asked:
        return None
    tables = (*before.tables, table.replace_schema_metadata(None))
    return Progress(tables, end, position, seconds, metrics)
