"""Starting a worker process: a fresh interpreter that serves the run at a socket."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from headwater.workflow.messages import WorkerSetup

# Not `-m`: neither the caller's main module nor the current folder has a say in a worker.
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from headwater.workflow.worker import main; main(int(sys.argv[1]))"
)


class WorkerProcess(Protocol):
    """What a run needs of a worker process; `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once it ends; raises subprocess.TimeoutExpired after `timeout` seconds."""

    def kill(self) -> None:
        """End it at once; harmless when it has ended."""


#: Starts `worker.main` on an inherited socket, given the run's setup, the socket's descriptor
#: and the file for what the worker says; in a process group of its own, so that Ctrl-C reaches
#: the run alone, which tells its workers.
Launch = Callable[[WorkerSetup, int, Path], WorkerProcess]


def launch_worker(setup: WorkerSetup, descriptor: int, log: Path) -> WorkerProcess:
    """A worker in an interpreter of its own, with `setup.threads` threads."""
    environment = os.environ | worker_environment(setup)
    paths = [path or str(Path.cwd()) for path in sys.path]
    with log.open("wb") as said:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-c", _START, str(descriptor), *paths],
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            process_group=0,
        )


def worker_environment(setup: WorkerSetup) -> dict[str, str]:
    """What libraries read when they are imported or start: threads, and how they behave."""
    threads = str(setup.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if setup.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    return environment
