"""Rows of a source with the place each came from, whatever the format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.plain_json import parse_json
from headwater.tasks.benchmarks import benchmark_names
from headwater.tasks.hub import hub_name, hub_rows
from headwater.tasks.lines import numbered_lines

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and where it stands: behind `place`, such as "train.jsonl:", at `number`."""

    place: str
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """The row's place as messages name it (`file:line`)."""
        return f"{self.place}{self.number}"


def source_name(source: str) -> str:
    """Short name of a source, for ids and `Problem.source` where the rows have none.

    >>> source_name("data/train.jsonl.gz"), source_name("hf:openai/gsm8k:main:test")
    ('train', 'gsm8k-test')
    """
    if source.startswith("hf:"):
        return hub_name(source)
    return Path(source).name.partition(".")[0]


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a file or a hub dataset (`hf:...`), in order; blank lines are skipped.

    Raises InputError for a missing or unreadable file, an unknown suffix, and lines that are
    not JSON objects.
    """
    if source.startswith("hf:"):
        for number, values in enumerate(hub_rows(source), start=1):
            yield Row(f"{source} row ", number, values)
        return
    path = Path(source).expanduser()
    if not path.name.endswith(_SUFFIXES):
        raise InputError(
            f"{source} is of no known kind; give a path ending in {', '.join(_SUFFIXES)}, "
            "hf:ID[:CONFIG][:SPLIT], task:arithmetic, reasoning_gym:NAME or a benchmark: "
            f"{benchmark_names()}"
        )
    if not path.is_file():
        raise InputError(f"{source} is not a file; give the path of an existing problem file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    else:
        yield from _json_line_rows(path)


def _json_line_rows(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        yield _row(f"{path}:", number, line)


def _row(place: str, number: int, line: bytes) -> Row:
    try:
        values = parse_json(line)
    except ValueError as error:  # covers bytes that are not UTF-8
        raise InputError(
            f"{place}{number}: not JSON ({error}); write one JSON object a line, in UTF-8"
        ) from error
    return _record(place, number, values)


def _record(place: str, number: int, values: object) -> Row:
    if not isinstance(values, dict):
        raise InputError(
            f"{place}{number}: {str(values)[:40]!r} is not a JSON object; write {{...}}"
        )
    return Row(place, number, values)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        items = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); write a list of objects") from error
    if not isinstance(items, list):
        raise InputError(f"{path}: holds one {type(items).__name__}; write a list of objects")
    for number, item in enumerate(items, start=1):
        yield _record(f"{path} item ", number, item)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # slow to import, and most sources do not need it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row ", number, values)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: unreadable as Parquet after row {number} ({error}); write the file again"
        ) from error
