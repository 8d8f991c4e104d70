"""What a sealed worker may not do: write, start processes, reach the network, signal others.

Two layers. An audit hook refuses whatever Python announces, everywhere. Where the kernel has
Landlock (Linux 5.13 and later) it refuses the same to native code. Neither can be taken off.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
import sys
from typing import Any, NoReturn

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
#: Refused as a whole, so that an event of a later Python is refused too; `_READING` excepted.
_REFUSED_FAMILIES = frozenset(
    {
        "os", "shutil", "tempfile", "subprocess", "pty", "socket", "ctypes", "_posixsubprocess",
        "sqlite3", "dbm", "mmap", "fcntl", "signal", "syslog", "webbrowser", "http", "urllib",
        "ftplib", "imaplib", "poplib", "smtplib", "nntplib", "telnetlib",
    }
)  # fmt: skip
_READING = frozenset(
    {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr"}
)
_UNANNOUNCED = ("mkfifo", "mknod")
#: sympy writes and compiles small functions of its own, and evaluates numerals as source. What
#: no such text has: an attribute, a name with two underscores, a name that leads out.
_REACHES_OUT = re.compile(
    r"__|\.\s*[^\W\d]|\b(?:import|open|exec|eval|compile|getattr|setattr|delattr|globals|locals"
    r"|vars|breakpoint|input|exit|quit)\b"
)
_SYMPY_NAMES = "from sympy import *"

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_NO_NEW_PRIVILEGES = 38
_READ_FILE_AND_DIRECTORY = 0b1100
#: Kinds of file access that each version of Landlock knows, in bits from the lowest.
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP, _SOCKETS_AND_SIGNALS = 0b11, 0b11


class ForbiddenInWorker(Exception):
    """Something in a graded text tried to reach outside; it was stopped."""


def seal() -> None:
    """Give up, for good, everything but reading and computing."""
    _forbid_to_the_kernel()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for module in (os, sys.modules[os.name]):
        for name in _UNANNOUNCED:
            setattr(module, name, _refuse)
    sys.addaudithook(_refuse_side_effects)


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _system_call(_CREATE_RULESET, None, 0, 1))


def _forbid_to_the_kernel() -> None:
    version = landlock_version()
    if version == 0:
        return
    bits = _FILE_BITS.get(version, max(_FILE_BITS.values()))
    rules = struct.pack(
        "QQQ",
        ((1 << bits) - 1) & ~_READ_FILE_AND_DIRECTORY,
        _TCP if version >= 4 else 0,
        _SOCKETS_AND_SIGNALS if version >= 6 else 0,
    )
    known = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = _system_call(_CREATE_RULESET, rules[:known], known, 0)
    if ruleset < 0:
        return
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _system_call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _system_call(number: int, *arguments: bytes | int | None) -> int:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    wide = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return int(call(ctypes.c_long(number), *wide))


def _refuse(*arguments: object, **options: object) -> NoReturn:
    raise ForbiddenInWorker("special files")


def _refuse_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        refused = _opens_for_writing(*arguments[1:3])
    elif event == "compile":
        refused = _compiles_what_reaches_out(*arguments)
    else:
        refused = event.partition(".")[0] in _REFUSED_FAMILIES and event not in _READING
    if refused:
        raise ForbiddenInWorker(event)


def _opens_for_writing(mode: object, flags: object) -> bool:
    return (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or (
        isinstance(flags, int) and bool(flags & _WRITE_FLAGS)
    )


def _compiles_what_reaches_out(source: object, filename: object) -> bool:
    """Whether text that is no file's is compiled, and is more than formulas."""
    if not (isinstance(filename, str) and filename.startswith("<")):
        return False
    if isinstance(source, bytes):
        source = source.decode(errors="replace")
    if not isinstance(source, str) or source == _SYMPY_NAMES:
        return False
    return _REACHES_OUT.search(source) is not None
