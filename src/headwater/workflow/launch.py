"""Starting a worker process: a fresh interpreter that serves the run at a socket."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from headwater.errors import InputError
from headwater.workflow.messages import WorkerSetup
from headwater.world import MEETING

#: How often ranks are looked at.
_WATCH_SECONDS = 0.1

_FOLLOW = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from headwater.workflow.rank import follow; follow(int(sys.argv[1]))"
)
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
    """A worker in an interpreter of its own, with `setup.threads` threads, and as many other ranks
    as its stages are run by. Under torchrun those are there already."""
    log.write_bytes(b"")
    environment = os.environ | worker_environment(setup)
    if setup.ranks == 1 or launched_rank() is not None:
        return _start(_START, descriptor, environment, log)
    return _Gang(setup, descriptor, environment, log)


def launched_rank() -> int | None:
    """This process's rank where torchrun started it as one of several; None otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return None
    return int(os.environ["RANK"])


def require_one_launcher(nproc: int | None, ray: str | None) -> None:
    """Raise InputError where torchrun started this process, and something else is to start ranks:
    the main one would run without the others, which would wait for it for ever."""
    if launched_rank() is None:
        return
    started = int(os.environ["WORLD_SIZE"])
    if ray is not None:
        raise InputError(
            f"--ray {ray} under torchrun, which started {started} processes; expected one of the "
            "two, because either starts the ranks of a stage: run headwater itself with --ray"
        )
    if nproc not in (None, started):
        raise InputError(
            f"--nproc {nproc} under torchrun, which started {started} processes; expected the "
            "same number: leave --nproc out, or give it to torchrun as --nproc-per-node"
        )


def _start(
    code: str, descriptor: int, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    paths = [path or str(Path.cwd()) for path in sys.path]
    with log.open("ab") as said:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-c", code, str(descriptor), *paths],
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            process_group=0,
        )


class _Gang:
    """A worker and the other ranks of its stages: when one is lost, all end.

    They meet at a file, and the others hold one end of a pipe that closes with this process. Gangs
    at once take GPUs one after another, and by turns where there are fewer.
    """

    def __init__(
        self, setup: WorkerSetup, descriptor: int, environment: Mapping[str, str], log: Path
    ) -> None:
        self._meeting = tempfile.TemporaryDirectory(prefix="headwater-ranks-")
        # what ranks say to each other is pickled: nobody else is to reach it
        ours = (
            {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
            | dict(environment)
            | {
                MEETING: str(Path(self._meeting.name) / "ranks"),
                "WORLD_SIZE": str(setup.ranks),
            }
        )
        lifeline, self._life = os.pipe()
        self._processes = []
        for rank in range(setup.ranks):
            place = setup.number * setup.ranks + rank
            of_rank = ours | {"RANK": str(rank), "LOCAL_RANK": str(place)}
            code, held = (_FOLLOW, lifeline) if rank else (_START, descriptor)
            self._processes.append(_start(code, held, of_rank, log))
        os.close(lifeline)
        self._code: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def _watch(self) -> None:
        """The first rank to fail takes the others with it; its code is the gang's."""
        while self._code is None:
            codes = [process.poll() for process in self._processes]
            failed = [code for code in codes if code]
            if failed:
                self._code = failed[0]
            elif None not in codes:
                self._code = 0
            else:
                time.sleep(_WATCH_SECONDS)
        self.kill()
        for process in self._processes:
            process.wait()
        os.close(self._life)
        self._meeting.cleanup()
        self._ended.set()

    def poll(self) -> int | None:
        """The exit code of the gang; None while it runs."""
        return self._code if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once all have ended; raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("ranks", timeout or 0.0)
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        """End every rank at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()


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
