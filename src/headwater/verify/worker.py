"""The process that runs one grading function under hard limits, for `pool.WorkerPool`.

Started as `python -m headwater.verify.worker '{...settings...}'`. It reads one JSON request a
line from standard input and writes one JSON reply a line to what was standard output; anything
the function prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from headwater.verify.loading import load_function

_CPU_SLACK_SECONDS = 2
_FORBIDDEN_EVENTS = frozenset(
    {
        "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
        "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind", "os.remove",
        "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
        "os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile", "ctypes.dlopen",
    }
)  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class ForbiddenInWorker(Exception):
    """Something in a graded text tried to reach outside; it was stopped."""


def main(settings: dict[str, Any]) -> None:
    """Serve requests until standard input closes.

    `settings`: target "module:function", memory_bytes, timeout_seconds, sealed (whether writing,
    processes and sockets are refused outright).
    """
    requests, replies = _private_pipes()
    sys.dont_write_bytecode = True
    _limit_resources(settings["memory_bytes"])
    try:
        function = load_function(settings["target"])
    except Exception as error:
        _reply(replies, {"load_error": f"{type(error).__name__}: {error}"})
        return
    if settings["sealed"]:
        sys.addaudithook(_refuse_side_effects)
    _reply(replies, {"ready": True})
    for line in requests:
        _limit_cpu(settings["timeout_seconds"])
        _reply(replies, _answer(function, json.loads(line)))


def _answer(function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """Call and describe the outcome; error texts stay here, since they may quote an answer."""
    try:
        value = function(*arguments)
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"limit": "nesting"}
    except Exception as error:
        return {"error": type(error).__name__}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    return {"value": None, "type": type(value).__name__}


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to the parent for this module alone; give the function empty ones."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _limit_resources(memory_bytes: int) -> None:
    for kind, soft in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit_cpu(timeout_seconds: float) -> None:
    """Let this request use its own time and a little more; the kernel ends what runs on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + timeout_seconds) + _CPU_SLACK_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _refuse_side_effects(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and (
        (isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+"))
        or (isinstance(arguments[2], int) and bool(arguments[2] & _WRITE_FLAGS))
    )
    if writes or event in _FORBIDDEN_EVENTS:
        raise ForbiddenInWorker(event)


def _reply(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
