"""JSON that may come from anybody, read within limits.

Python's own reader takes nesting until its stack ends, and strings that hold half a surrogate
pair, which no file and no tokenizer can take in afterwards.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DEEPEST = 100
LARGEST_BYTES = 256 * 2**20
"""Of a file that describes a run, a model or an evaluation; data sets have no such limit."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError for text that is not JSON or not UTF-8, is nested deeper than `DEEPEST`, or
    holds half a surrogate pair.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    # What is opened too seldom to be deep needs no second look.
    may_be_deep = text.count("[") + text.count("{") > DEEPEST
    may_be_torn = _SURROGATE.search(text) is not None
    if may_be_deep or may_be_torn:
        _check(value)
    return value


def read_json_file(path: Path) -> Any:
    """The value in a JSON file that describes something.

    Raises OSError where it cannot be read, ValueError where it is larger than `LARGEST_BYTES`, and
    as `parse_json` does.
    """
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(f"{size:,} bytes, more than the {LARGEST_BYTES:,} that are read")
    return parse_json(path.read_bytes())


def _check(value: Any) -> None:
    """Raise ValueError for what is too deep, or no text that could be written again."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_text(one)
            elif isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = below
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair and no character") from None
