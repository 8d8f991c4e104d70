"""A disk that fails on demand: errors where Python is about to touch files below a folder."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class _Fault:
    below: str
    number: int
    reads: bool  # whether reading fails as well
    events: tuple[str, ...]


_faults: list[_Fault] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for fault in _faults:
        if event not in fault.events or fault.below not in f"{arguments[0]}/":
            continue
        if event == "open" and not fault.reads and not arguments[2] & _WRITING:
            continue
        raise OSError(fault.number, os.strerror(fault.number), str(arguments[0]))


def _begin(fault: _Fault) -> None:
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    _faults.append(fault)


@contextmanager
def _failing(fault: _Fault) -> Iterator[None]:
    _begin(fault)
    try:
        yield
    finally:
        _faults.remove(fault)


def _full(below: Path) -> _Fault:
    return _Fault(f"{below}/", errno.ENOSPC, False, ("open", "os.mkdir"))


def disk_full(below: Path) -> Any:
    """In this context nothing below a folder can be opened for writing or made: ENOSPC."""
    return _failing(_full(below))


def fill_disk(below: Path) -> None:
    """As `disk_full`, for the rest of the process's life."""
    _begin(_full(below))


def denied(below: Path) -> Any:
    """In this context nothing below a folder can be opened: EACCES."""
    return _failing(_Fault(f"{below}/", errno.EACCES, True, ("open",)))


def no_renames(below: Path) -> Any:
    """In this context nothing below a folder can be renamed, as if the machine stopped before."""
    return _failing(_Fault(f"{below}/", errno.EIO, False, ("os.rename",)))
