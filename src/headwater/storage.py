"""Files that survive: written whole, flushed to disk, sealed, and a disk's errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwater.errors import HeadwaterError, StageError

SEAL = "seal"
UNFINISHED = ".part"
"""Ends the name of a file until it is whole."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
#: How libraries that hide the number of an error say that a disk is full.
_SAYS_FULL = ("No space left on device", "os error 28", "database or disk is full")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside it, flushed to disk, by one rename.

    On return it survives a power cut. Raises StageError where the disk is full or the folder may
    not be written; the file is then as it was.
    """
    beside = path.with_name(f"{path.name}{UNFINISHED}")
    with disk_errors(path):
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        flush(path.parent)


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with a hash over its content, so that a changed character is noticed.

    >>> unsealed(sealed({"steps": 3}))
    {'steps': 3}
    """
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain | {SEAL: _hash(plain)}


def unsealed(record: Any) -> dict[str, Any]:
    """What was given to `sealed`; a record without a seal, of an older version, as it is.

    Raises ValueError for a record that its seal does not vouch for, or that is no mapping.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where a mapping is expected")
    plain = {name: value for name, value in record.items() if name != SEAL}
    if SEAL in record and record[SEAL] != _hash(plain):
        raise ValueError("its content differs from its seal")
    return plain


def _hash(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise StageError, in words, for a full disk or missing permission met in this block.

    path: what was being written, where the error itself does not say.
    """
    try:
        yield
    except Exception as error:
        told = disk_error(error, path)
        if told is None:
            raise
        raise told from error


def disk_error(error: BaseException, path: Path) -> StageError | None:
    """What an error of the disk means and what to do; None for an error of another kind."""
    if isinstance(error, HeadwaterError):  # told already
        return None
    number = error.errno if isinstance(error, OSError) else None
    named = error.filename if isinstance(error, OSError) else None
    where = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    if number in _FULL or any(words in str(error) for words in _SAYS_FULL):
        return StageError(
            f"{where}: no space left on the disk ({free_space(where)} free); free some and run the "
            "same command again: what is published and checkpointed is kept"
        )
    if number in _DENIED:
        return StageError(
            f"{where}: {os.strerror(number or 0).lower()}; it must be readable and writable for "
            "the user who runs: change its owner or mode (chmod -R u+rwX) and run again"
        )
    return None


def free_bytes(path: Path) -> int | None:
    """Bytes free on the disk where `path` lies or would lie; None where nobody says."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def free_space(path: Path) -> str:
    """How much is free on the disk where `path` lies or would lie, such as "1.5 GiB"."""
    found = free_bytes(path)
    return "an unknown amount" if found is None else in_binary_units(found)


def in_binary_units(amount: float) -> str:
    """Bytes in words, such as "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
