"""Write events of a process: what Python is about to do to the files of a run, one by one."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "shutil.copyfile",
}
_STATEMENTS = ("BEGIN IMMEDIATE", "INSERT", "UPDATE", "COMMIT", "CREATE", "PRAGMA journal")


def watch(folder: Path, on_event: Callable[[int, str], None]) -> None:
    """Call `on_event(number, what)` before each write below `folder` by this process, from now on.

    Writes are: a file opened for writing, renamed, removed, copied or cut; a folder made or
    removed; a statement of SQLite that changes the ledger. Whatever `on_event` raises, the
    writing call raises, but for statements of SQLite, which go on.
    """
    inside, process = f"{folder}/", os.getpid()
    number = 0

    def tell(what: str) -> None:
        nonlocal number
        if os.getpid() != process:  # a child that was forked with the hook
            return
        number += 1
        on_event(number, what)

    def statement(text: str) -> None:
        if text.lstrip().startswith(_STATEMENTS):
            tell(f"sqlite {text.split()[0]}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITING and inside in f"{path}/":
                tell(f"open {path}")
        elif event in _CHANGES and inside in f"{arguments[0]}/":
            tell(f"{event} {arguments[0]}")

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        db = plain_connect(*arguments, **options)
        db.set_trace_callback(statement)
        return db

    plain_connect = sqlite3.connect
    sqlite3.connect = connect
    sys.addaudithook(hook)


def killed_at(chosen: int) -> Callable[[int, str], None]:
    """Ends the process, as by SIGKILL, just before its write number `chosen`."""

    def on_event(number: int, what: str) -> None:
        if number == chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_event


def disk_full_from(chosen: int) -> Callable[[int, str], None]:
    """From write number `chosen` on nothing can be opened for writing, made or copied."""

    def on_event(number: int, what: str) -> None:
        if number >= chosen and what.startswith(("open", "os.mkdir", "shutil")):
            path = what.partition(" ")[2]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return on_event


def counted_in(file: Path) -> Callable[[int, str], None]:
    """Keeps the number of writes so far in `file`, which lies outside the watched folder."""

    def on_event(number: int, what: str) -> None:
        file.write_text(str(number))

    return on_event
