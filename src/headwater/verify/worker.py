"""What a forked worker does: calls one function, case by case, under hard limits.

It reads one JSON request a line, `[number, arguments]`, and writes one JSON reply a line that
repeats the number. Anything the function prints goes nowhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from headwater.verify.seal import seal

_CPU_SLACK_SECONDS = 2
_REPLY_CHARACTERS = 1 << 16
_PARENT_DEATH_SIGNAL = 1

Function = Callable[..., Any]


def describe_load_error(error: BaseException) -> bytes:
    """The message that says why the target cannot be loaded."""
    return _line({"load_error": f"{type(error).__name__}: {error}"[:_REPLY_CHARACTERS]})


def limit_resources(memory_bytes: int) -> None:
    """Limit address space, and let no file grow and no core be written, here and in children."""
    for kind, soft in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(kind, (value, value))


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, where the kernel can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve(connection: int, function: Function, timeout_seconds: float, sealed: bool) -> None:
    """Answer requests that come over a socket's descriptor until it closes."""
    with open(connection, "rb", closefd=False) as requests:
        replies = open(connection, "wb", buffering=0, closefd=False)  # noqa: SIM115
        if sealed:
            seal()
        _write(replies, _line({"ready": True}))
        for request in requests:
            number, arguments = json.loads(request)
            _limit_cpu(timeout_seconds)
            _write(replies, _line(_answer(function, arguments) | {"number": number}))


def _write(replies: Any, message: bytes) -> None:
    left = memoryview(message)
    while left:
        left = left[replies.write(left) :]


def _answer(function: Function, arguments: list[str]) -> dict[str, Any]:
    """Call and describe the outcome; error texts stay here, since they may quote an answer."""
    try:
        value = function(*arguments)
    except MemoryError:
        return {"limit": "memory"}
    except RecursionError:
        return {"limit": "nesting"}
    except BaseException as error:
        return {"error": type(error).__name__}
    if value is None or isinstance(value, bool | float):
        return {"value": value}
    if isinstance(value, int) and value.bit_length() < 64:
        return {"value": int(value)}
    if isinstance(value, str) and len(value) < _REPLY_CHARACTERS:
        return {"value": str(value)}
    return {"value": None, "type": type(value).__name__}


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _limit_cpu(timeout_seconds: float) -> None:
    """Let this request use its own time and a little more; the kernel ends what runs on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + timeout_seconds) + _CPU_SLACK_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )
