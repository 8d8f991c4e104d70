"""The process that imports a grading function once and forks a worker of it in milliseconds.

Started as `python -m headwater.verify.forkserver '{...settings...}'` by `processes.ForkServer`.
It runs nothing of what is graded and has one thread, so it always answers: messages of one size
ask it to fork a worker for a socket, or to kill one. Its workers end with it, and it ends with
the process that started it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from headwater.verify import worker
from headwater.verify.loading import load_function

MESSAGE = struct.Struct("!cI")
STATUS = struct.Struct("!i")
FORK, KILL, COLLECT = b"f", b"k", b"c"

_LOOK_SECONDS = 1.0


def main(settings: dict[str, Any]) -> NoReturn:
    """Serve until the control socket closes or the starting process is gone.

    `settings`: target "module:function", memory_bytes, timeout_seconds, sealed, the control
    socket's descriptor, the starting process's id, and preload: whether to import the target
    here (else every worker imports it for itself).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    worker.limit_resources(settings["memory_bytes"])
    function: worker.Function | None = None
    failure: BaseException | None = None
    if settings["preload"]:
        try:
            function = load_function(settings["target"])
        except BaseException as error:
            failure = error
        if _threads() > 1:
            _start_again(settings | {"preload": False})
    gc.collect()
    gc.freeze()
    server = _Server(settings, function, failure)
    signal.signal(signal.SIGTERM, lambda *_: server.end())
    server.serve()
    server.end()


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def _start_again(settings: dict[str, Any]) -> NoReturn:
    """Become a server without the target: threads that importing it started survive no fork."""
    arguments = [sys.executable, *_arguments(settings)]
    os.execv(sys.executable, arguments)  # noqa: S606 - this program again, without a shell


def _arguments(settings: dict[str, Any]) -> list[str]:
    return ["-P", "-m", "headwater.verify.forkserver", json.dumps(settings)]


def command(settings: dict[str, Any]) -> list[str]:
    """The command line that starts a server."""
    return [sys.executable, *_arguments(settings)]


class _Server:
    """Workers by their number: running ones, and killed ones that are yet to be collected."""

    def __init__(
        self,
        settings: dict[str, Any],
        function: worker.Function | None,
        failure: BaseException | None,
    ) -> None:
        self._settings = settings
        self._function = function
        self._failure = failure
        self._control = socket.socket(fileno=settings["control"])
        self._running: dict[int, int] = {}
        self._killed: list[int] = []

    def serve(self) -> None:
        while True:
            if select.select([self._control], [], [], _LOOK_SECONDS)[0]:
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE.size, 1)
                if not message:
                    return
                verb, number = MESSAGE.unpack(message)
                self._do(verb, number, descriptors)
            elif os.getppid() != self._settings["parent"]:
                return
            self._killed = [pid for pid in self._killed if not _has_ended(pid)]

    def _do(self, verb: bytes, number: int, descriptors: list[int]) -> None:
        if verb == FORK:
            (connection,) = descriptors
            self._fork(number, connection)
            os.close(connection)
            return
        pid = self._running.pop(number, None)
        if pid is not None:
            _kill(pid)
        if verb == KILL and pid is not None:
            self._killed.append(pid)
        if verb == COLLECT:
            status = 0 if pid is None else os.waitpid(pid, 0)[1]
            self._control.sendall(STATUS.pack(status))

    def _fork(self, number: int, connection: int) -> None:
        os.set_inheritable(connection, False)
        if self._failure is not None:
            os.write(connection, worker.describe_load_error(self._failure))
            return
        server = os.getpid()
        with contextlib.suppress(OSError):
            pid = os.fork()
            if pid == 0:
                self._be_worker(connection, server)
            self._running[number] = pid

    def _be_worker(self, connection: int, server: int) -> NoReturn:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            worker.end_with(server)
            os.setsid()
            self._control.close()
            function = self._function or self._load(connection)
            settings = self._settings
            worker.serve(connection, function, settings["timeout_seconds"], settings["sealed"])
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _load(self, connection: int) -> worker.Function:
        try:
            return load_function(self._settings["target"])
        except BaseException as error:
            os.write(connection, worker.describe_load_error(error))
            raise

    def end(self) -> NoReturn:
        """Kill every worker and exit."""
        for pid in self._running.values():
            _kill(pid)
        os._exit(0)


def _kill(pid: int) -> None:
    """Kill a worker and whatever it started; its id is its own until it has been waited for."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _has_ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
