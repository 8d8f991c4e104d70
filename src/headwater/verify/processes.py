"""The caller's ends of a fork server and of the workers that it forks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

from headwater.redaction import without_secrets
from headwater.verify.forkserver import COLLECT, FORK, KILL, MESSAGE, STATUS, command

_START_SECONDS = 60.0
_SLACK_SECONDS = 10.0
_END_SECONDS = 5.0
_LAST_SECONDS = 1.0
_CRASHES = 3
_KILLS = 50
_READ_BYTES = 1 << 16
_REPLY_BYTES = 1 << 20
_SENT_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one case may use.

    `sealed` refuses every write, process and socket; files cannot grow in any worker.
    """

    timeout_seconds: float = 5.0
    memory_bytes: int = 2 << 30
    argument_characters: int = 1 << 20
    sealed: bool = True


@dataclass(slots=True)
class Attempts:
    """How often something ended its process by itself, and how often others ended it."""

    crashes: int = 0
    kills: int = 0

    def add(self, killed_by_others: bool) -> None:
        """Count one more."""
        self.kills += killed_by_others
        self.crashes += not killed_by_others

    @property
    def exhausted(self) -> bool:
        """Whether there is no point in another."""
        return self.crashes >= _CRASHES or self.kills >= _KILLS


@dataclass(slots=True)
class Case:
    """One call on its way: its place in the batch, and the time and attempts it took so far."""

    index: int
    arguments: tuple[str, ...] = field(repr=False)
    seconds: float = 0.0
    attempts: Attempts = field(default_factory=Attempts)


class ForkServer:
    """A process that has imported `target` once; `fork` starts a worker in milliseconds."""

    def __init__(self, target: str, limits: WorkerLimits) -> None:
        """Start the process; it imports `target` while the caller goes on."""
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_END_SECONDS)
        self._limits = limits
        self._forked = 0
        self._owner = os.getpid()
        self._since = time.monotonic()
        self._start_seconds = _START_SECONDS
        self._proven = False
        self._silent = False
        settings = {
            "target": target,
            "memory_bytes": limits.memory_bytes,
            "timeout_seconds": limits.timeout_seconds,
            "sealed": limits.sealed,
            "control": theirs.fileno(),
            "parent": self._owner,
            "preload": True,
        }
        environment = dict(os.environ)
        if limits.sealed:  # what is graded may not even read them
            environment = without_secrets(environment)
        here = str(Path.cwd())  # last: a user's modules lie there, and may shadow nothing
        paths = [path or here for path in sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, here]))
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        environment["PYTHONHASHSEED"] = "0"
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command(settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    @property
    def usable(self) -> bool:
        """Whether it runs, and belongs to this process and not to one that forked this one."""
        return self._is_mine and not self._silent and self._process.poll() is None

    @property
    def _is_mine(self) -> bool:
        return self._owner == os.getpid()

    def fork(self) -> Worker:
        """Return a new worker, ready once it says so; of a server that has ended, a dead one."""
        self._forked += 1
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):
            message = MESSAGE.pack(FORK, self._forked)
            socket.send_fds(self._control, [message], [theirs.fileno()])
        timeouts = self._start_seconds, self._limits.timeout_seconds
        return Worker(self, self._forked, ours, *timeouts)

    def note_ready(self) -> None:
        """Take in that a worker is ready: the next ones may take as long and a little more."""
        if not self._proven:
            took = time.monotonic() - self._since
            self._proven = True
            self._start_seconds = min(_START_SECONDS, took + _SLACK_SECONDS)

    def kill(self, number: int) -> None:
        """Kill a worker without waiting for its end; in a forked copy do nothing."""
        if self._is_mine:
            with contextlib.suppress(OSError):
                self._control.sendall(MESSAGE.pack(KILL, number))

    def collect(self, number: int) -> int | None:
        """Kill a worker and return its exit code, negative for a signal; None if unknown."""
        try:
            self._control.sendall(MESSAGE.pack(COLLECT, number))
            status = self._control.recv(STATUS.size, socket.MSG_WAITALL)
        except OSError:
            status = b""
        if len(status) < STATUS.size:
            self._silent = True
            return None
        return os.waitstatus_to_exitcode(STATUS.unpack(status)[0])

    def was_killed(self) -> bool:
        """Whether somebody else ended it; it closes its sockets a moment before it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return _by_others(self._process.wait(timeout=_LAST_SECONDS))
        return False

    def close(self, *, at_once: bool = False) -> None:
        """End the server and with it every worker; in a forked copy only forget it.

        `at_once`: do not wait for it to end them itself.
        """
        self._control.close()
        if not self._is_mine:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0 if at_once or not self._proven else _END_SECONDS)
        self._process.kill()
        self._process.wait()


class End(Enum):
    """What ended a worker."""

    ITSELF = auto()
    OTHERS = auto()
    PROCESSOR_TIME = auto()


class Worker:
    """One process, the case it has in hand, and the bytes on their way to and from it."""

    def __init__(
        self,
        server: ForkServer,
        number: int,
        connection: socket.socket,
        start_seconds: float,
        timeout_seconds: float,
    ) -> None:
        connection.setblocking(False)
        self.server = server
        self.connection = connection
        self.ready = False
        self.dead = False
        self.garbled = False
        self.case: Case | None = None
        self.sent = 0
        self.unsent = b""
        self.since = time.monotonic()
        self.deadline = self.since + start_seconds
        self._number = number
        self._timeout_seconds = timeout_seconds
        self._heard = bytearray()

    def send(self, case: Case) -> None:
        """Take a case in hand; its clock starts now."""
        self.case = case
        self.sent += 1
        self.unsent = json.dumps([self.sent, case.arguments]).encode() + b"\n"
        self.since = time.monotonic()
        self.deadline = self.since + self._timeout_seconds
        self.push()

    def push(self) -> None:
        """Write as much of the request as the socket takes."""
        while self.unsent and not self.dead:
            try:
                written = self.connection.send(self.unsent)
            except BlockingIOError:
                return
            except OSError:
                self.dead = True
                return
            self.unsent = self.unsent[written:]

    def read(self) -> dict[str, Any] | None:
        """Return the next reply, if a whole one has come.

        What is no reply to the case in hand, or has no end, leaves the worker garbled and dead.
        """
        while not self.dead and b"\n" not in self._heard:
            try:
                piece = self.connection.recv(_READ_BYTES)
            except BlockingIOError:
                return None
            except OSError:
                piece = b""
            self.dead = not piece
            self._heard += piece
            if len(self._heard) > _REPLY_BYTES:
                self.dead = self.garbled = True
        if self.dead:
            return None
        line, _, rest = bytes(self._heard).partition(b"\n")
        self._heard = bytearray(rest)
        reply = self._understood(line)
        self.garbled = self.dead = reply is None
        return reply

    def _understood(self, line: bytes) -> dict[str, Any] | None:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(reply, dict):
            return None
        if not self.ready:
            return reply if {"ready", "load_error"} & reply.keys() else None
        expected = self.sent if self.case is not None else None
        return reply if expected is not None and reply.get("number") == expected else None

    def end(self) -> End:
        """End the process and return what had ended it before that."""
        if self.garbled:
            return End.ITSELF
        exit_code = self.server.collect(self._number)
        if exit_code == -signal.SIGXCPU:
            return End.PROCESSOR_TIME
        killed = self.server.was_killed() if exit_code is None else _by_others(exit_code)
        return End.OTHERS if killed else End.ITSELF

    def kill(self) -> None:
        """End the process at once."""
        self.dead = True
        self.connection.close()
        self.server.kill(self._number)


def _by_others(exit_code: int | None) -> bool:
    return exit_code is not None and -exit_code in _SENT_BY_OTHERS
