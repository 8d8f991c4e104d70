"""Problems that a program holds already: lists of rows or texts, and datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.tasks.problems import LabelledProblems, load_problems, problems_of_rows
from headwater.tasks.rows import Row

#: A source's name or file; rows as mappings, or prompts as texts; whatever yields rows, such as
#: a split of a `datasets.DatasetDict`.
Problems = str | Path | Iterable[Mapping[str, Any]] | Iterable[str]

_NAME = "problems"


def given_problems(
    given: Problems, columns: Mapping[str, str] | None = None, *, keep_rows: bool = False
) -> LabelledProblems:
    """Problems and labels of whatever a caller gives for them.

    columns, keep_rows: as of `load_problems`. Raises InputError as it does, naming a row by its
    number, and for what is no list of rows or prompts.
    """
    if isinstance(given, str | Path):
        return load_problems(str(given), columns, keep_rows=keep_rows)
    return problems_of_rows(_rows(given), _NAME, columns, keep_rows=keep_rows)


def _rows(given: Iterable[Mapping[str, Any]] | Iterable[str]) -> Iterator[Row]:
    if isinstance(given, Mapping):
        raise InputError(
            f"problems is a mapping of {', '.join(map(str, given))}, expected rows one after "
            "another; choose a split of a dataset, as in dataset['train'], or put a single row "
            "into a list"
        )
    listed = isinstance(given, list | tuple)
    if not listed and not hasattr(given, "__iter__"):
        raise InputError(
            f"problems is a {type(given).__name__}; give a source, a list of rows (mappings) or "
            "prompts (texts), or a dataset"
        )
    for number, row in enumerate(given, start=1):
        if isinstance(row, Mapping):
            yield Row(f"{_NAME} row ", number, dict(row))
        elif isinstance(row, str) and listed:
            yield Row(f"{_NAME} row ", number, {"prompt": row})
        else:
            raise InputError(
                f"{_NAME} row {number} is a {type(row).__name__} in a {type(given).__name__}; "
                "give rows as mappings of columns, or a list of prompts"
            )
