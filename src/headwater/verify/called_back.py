"""Reward functions that live in the process which started the run: a notebook's, a script's.

A function object has no name that another process could import. It stays where it is: workers
send completions to the calling process, which calls the function in a thread and sends rewards
back. A call that takes too long is given up by the worker; its thread goes on, since Python can
end none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import socketserver
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.verify.identity import describe_function
from headwater.verify.reward_calls import call_of

PREFIX = "called:"
_ADDRESS = "HEADWATER_CALLING_PROCESS"
_HOPELESS = 16  # calls that raised, and none that returned

_Call = Callable[[str, str], str]


def offer(function: Callable[..., Any], name: str) -> str:
    """Let workers of this process call `function`; returns the verifier to name in a recipe.

    It holds a hash of the function's code and of what that refers to, so that stages are run again
    where either has changed. Raises TypeError for a function that takes no completions.
    """
    content = json.dumps(describe_function(function), sort_keys=True)
    key = f"{name}@{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    _host().functions[key] = _Offered(function)
    return f"{PREFIX}{key}"


class _Offered:
    """A function as it is called: what it raises is shown once a place, to whoever wrote it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._call = call_of(function, self._raised)
        self._shown: set[str] = set()
        self._returned = 0
        self._failed = 0

    def __call__(self, completions: str, row: str) -> str:
        reply = self._call(completions, row)
        raised = json.loads(reply).get("raised")
        self._failed += raised is not None
        self._returned += raised is None
        if raised is not None and not self._returned and self._failed >= _HOPELESS:
            return json.dumps({"found": f"nothing, and raised {raised} every time"})
        return reply

    def _raised(self, error: Exception, place: str) -> None:
        if place not in self._shown:
            self._shown.add(place)
            print("".join(traceback.format_exception(error)), end="", file=sys.stderr)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


class _Host:
    """The socket of this process, and the functions that can be called at it."""

    def __init__(self) -> None:
        functions: dict[str, _Call] = {}

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # a worker that was ended
                    for line in self.rfile:
                        self.wfile.write(_answer(functions, line) + b"\n")

        self.functions = functions
        self.process = os.getpid()
        folder = tempfile.mkdtemp(prefix="headwater-")  # nobody else may enter it
        self.address = str(Path(folder) / "functions")
        self._server = _Server(self.address, Handler)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        threading.Thread(
            target=self._server.serve_forever, name="reward functions", daemon=True
        ).start()


_hosts: list[_Host] = []  # of this process, the last


def _host() -> _Host:
    if not _hosts or _hosts[-1].process != os.getpid():
        _hosts.append(_Host())
    os.environ[_ADDRESS] = _hosts[-1].address  # inherited by workers
    return _hosts[-1]


def _answer(functions: dict[str, _Call], line: bytes) -> bytes:
    """The reply to one request: [key], or [key, completions, row]."""
    key, *arguments = json.loads(line)
    if key not in functions:
        return json.dumps({"unknown": key}).encode()
    return (functions[key](*arguments) if arguments else "{}").encode()


# --- in workers ----------------------------------------------------------------------------------


def caller(key: str) -> _Call:
    """What a worker calls: (completions, row), both as JSON -> rewards as JSON, by way of the
    calling process. Raises LookupError where that does not offer the function."""
    address = os.environ.get(_ADDRESS, "")
    with contextlib.closing(_Line(address)) as line:
        if "unknown" in json.loads(line.ask([key])):
            raise LookupError(_gone(key))
    lines: list[_Line] = []  # this process's, once it is asked; the fork server has none

    def call(completions: str, row: str) -> str:
        if not lines:
            lines.append(_Line(address))
        return lines[0].ask([key, completions, row])

    return call


class _Line:
    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(address)
        except OSError as error:
            self._socket.close()
            raise LookupError(_gone("it")) from error
        self._file = self._socket.makefile("rwb")

    def ask(self, request: list[str]) -> str:
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        reply = self._file.readline()
        if not reply:
            raise EOFError("the process with the reward function is gone")
        return reply.decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _gone(key: str) -> str:
    return (
        f"{key} is a function of a Python process that is not running here; start the stage from "
        "Python again, or put the function into a file and name it as reward:FILE.py:FUNCTION"
    )
