"""The run's side of a worker process."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from typing import Any

from headwater.workflow.launch import Launch
from headwater.workflow.messages import Done, ProblemSet, Quit, Rest, StageTask, WorkerSetup
from headwater.workflow.worker import log_of, socket_pair

#: How long a worker with nothing in hand may take to end.
QUIT_SECONDS = 5.0
_LOG_LINES = 8


class HeldWorker:
    """One worker process, our end of its socket, and the stage it has in hand."""

    def __init__(self, setup: WorkerSetup, launch: Launch) -> None:
        self.connection, theirs = socket_pair()
        log = log_of(setup)
        with theirs:
            self._process = launch(setup, theirs.fileno(), log)
        self.begin(setup)

    def begin(self, setup: WorkerSetup) -> None:
        """Have it serve this run from here on: a new worker, or one that rests."""
        self.stage: str | None = None
        self.setup = setup
        self._problem_sets: set[str] = set()
        self._log = log_of(setup)
        self.tell(setup)

    @property
    def number(self) -> int:
        """Of the worker among those at once."""
        return self.setup.number

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def tell(self, message: Any) -> None:
        """Send; a worker that is gone is found when it is listened to."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def give(self, task: StageTask) -> None:
        """Send a stage, and its problems where this process does not have them yet."""
        name = task.problem_set
        if name is not None:
            if name not in self._problem_sets:
                self._problem_sets.add(name)
                self.tell(ProblemSet(name, task.job.problems))
            task = replace(task, job=replace(task.job, problems=()))
        self.tell(task)

    def quit(self) -> None:
        """Ask an idle worker to end; end a busy one."""
        if self.stage is None:
            self.tell(Quit())
        else:
            self._process.kill()

    def rest(self) -> bool:
        """Whether it has let go of the run and waits for another; False: it leaves, or must."""
        self.tell(Rest())
        try:
            return self.connection.poll(QUIT_SECONDS) and isinstance(self.connection.recv(), Done)
        except (EOFError, OSError):
            return False

    def end(self, within_seconds: float) -> None:
        """Wait for the process that long, then kill it; closes our end."""
        try:
            self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def obituary(self, doing: str) -> str:
        """Why the process is gone, for a person."""
        try:
            code = self._process.wait(QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = 1
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; often too little memory: fewer compute.processes help" if code == -9 else ""
            return f"{doing}: its worker was killed by {name}{hint}; run again to continue"
        tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        said = " | ".join(line.strip() for line in tail if line.strip()) or "nothing"
        return f"{doing}: its worker ended with code {code}, saying: {said}; see {self._log}"
