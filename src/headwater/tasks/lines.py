"""Lines of a text file that may be compressed and may come from anybody, within limits."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from headwater.errors import InputError

LONGEST_LINE_BYTES = 64 * 2**20
LARGEST_RATIO = 1_000
"""Bytes that a byte of a compressed file may become: text of problems becomes 3 to 50."""
MOST_BLANK_LINES = 100_000  # in a row
_JUDGED_FROM_BYTES = 64 * 2**20  # a small file of one repeated row harms nobody


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank; a name ending in .gz is decompressed.

    Raises InputError with the line for a file that cannot be read, a line longer than
    `LONGEST_LINE_BYTES`, more than `MOST_BLANK_LINES` in a row, and a compressed file that becomes
    `LARGEST_RATIO` times as large.
    """
    number = blank = 0
    try:
        allowed = max(_JUDGED_FROM_BYTES, path.stat().st_size * LARGEST_RATIO)
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE_BYTES + 1):
                number += 1
                if len(line) > LONGEST_LINE_BYTES:
                    raise InputError(
                        f"{path}:{number}: longer than {LONGEST_LINE_BYTES:,} bytes; write one "
                        "problem a line"
                    )
                allowed -= len(line)
                if path.suffix == ".gz" and allowed < 0:
                    raise InputError(
                        f"{path}:{number}: decompresses to more than {LARGEST_RATIO:,} times its "
                        f"{path.stat().st_size:,} bytes; give the file uncompressed if it is meant"
                    )
                if line.strip():
                    blank = 0
                    yield number, line
                elif (blank := blank + 1) > MOST_BLANK_LINES:
                    raise InputError(
                        f"{path}:{number}: more than {MOST_BLANK_LINES:,} blank lines in a row; "
                        "remove them"
                    )
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if number == 0:
            raise InputError(
                f"{path} cannot be read ({reason}); give a .jsonl or .jsonl.gz file"
            ) from error
        raise InputError(
            f"{path}: unreadable after line {number} ({reason}); fetch or compress the file again"
        ) from error
