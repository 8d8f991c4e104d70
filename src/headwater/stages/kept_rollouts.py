"""Rollouts a stage keeps for reading: parts beside its checkpoints, one file when published."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headwater.stages.rollouts import ROLLOUT_SCHEMA
from headwater.storage import flush, sha256_of

#: Names files of rollouts that are still to be trained on.
_AHEAD = "ahead-"
#: Rollouts that are in memory together when a stage publishes.
_ROWS_AT_ONCE = 4096


class KeptRollouts:
    """Rows of `rollouts.parquet` so far: those since the last checkpoint, and parts on disk.

    folder: the stage's checkpoints. files: the parts by their hashes, for a checkpoint to vouch.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a step's rows, until the next checkpoint in memory."""
        self._rows += [dict(row) for row in rows]

    def save(self, step: int) -> None:
        """Write what was added since the last checkpoint."""
        if self._rows:
            part = self._folder / "rollouts" / f"part-{step:09d}.parquet"
            _write_rows(self._rows, part)
            self.files[part.relative_to(self._folder).as_posix()] = sha256_of(part)
            self._rows = []

    def keep_ahead(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep rollouts of a step to come, in place of those kept before."""
        path = self._folder / f"{_AHEAD}{step:09d}.parquet"
        for old in self._folder.glob(f"{_AHEAD}*"):
            if old.name not in self.files:  # those of the checkpoint in place are needed until then
                old.unlink()
        writing = path.with_suffix(".writing")
        write(writing)
        writing.replace(path)
        flush(self._folder)
        self.files = {n: h for n, h in self.files.items() if not n.startswith(_AHEAD)}
        self.files[path.name] = sha256_of(path)

    @property
    def ahead(self) -> Path | None:
        """Where rollouts of a step to come are kept."""
        names = [name for name in self.files if name.startswith(_AHEAD)]
        return self._folder / names[0] if names else None

    def resume(self, files: Mapping[str, str], step: int) -> None:
        """Continue after a checkpoint at `step` that vouched for `files`; later parts go."""
        self.files = dict(files)
        if not step:
            shutil.rmtree(self._folder / "rollouts", ignore_errors=True)
        for part in (self._folder / "rollouts").glob("part-*.parquet"):
            if int(part.stem.removeprefix("part-")) > step:
                part.unlink()

    def publish(self, path: Path) -> None:
        """Write every row to one file; nothing where there are none."""
        parts = sorted((self._folder / "rollouts").glob("part-*.parquet"))
        if parts or self._rows:
            _join_parts(parts, self._rows, path)


def are_vouched(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether all these files are there with these hashes."""
    return all(path.is_file() for path in map(folder.joinpath, files)) and all(
        sha256_of(folder / name) == found for name, found in files.items()
    )


def _write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=ROLLOUT_SCHEMA), path)
    flush(path)
    flush(path.parent)


def _join_parts(parts: Sequence[Path], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of the parts, then `rows`, as one file; holds some thousands at a time.

    Where the parts end, which is where a stage happened to save, shows in no byte of the file.
    """
    with pq.ParquetWriter(path, ROLLOUT_SCHEMA) as writer:
        waiting = ROLLOUT_SCHEMA.empty_table()
        for table in _tables_of(parts, rows):
            # Parts of an older version lack columns that are younger.
            waiting = pa.concat_tables((waiting, table), promote_options="default")
            while len(waiting) >= _ROWS_AT_ONCE:
                writer.write_table(waiting.slice(0, _ROWS_AT_ONCE).combine_chunks())
                waiting = waiting.slice(_ROWS_AT_ONCE)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


def _tables_of(parts: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> Iterator[pa.Table]:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = list(rows[start : start + _ROWS_AT_ONCE])
        yield pa.Table.from_pylist(chunk, schema=ROLLOUT_SCHEMA)
