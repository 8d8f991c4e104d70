"""Runs and workers forked from a process that has everything imported and no threads.

Importing torch takes seconds and a run of micro models hardly more: forked processes make
hundreds of kills affordable. What they run is the product's own code, from `run_study` and
`worker.main` on.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from headwater.errors import HeadwaterError, Interrupted
from headwater.workflow import worker
from headwater.workflow.messages import WorkerSetup

_PRELOADED = (
    "torch",
    "safetensors.torch",
    "pyarrow.parquet",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation.configuration_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "headwater.api.study",
    "headwater.report.files",
    "headwater.report.outcome",
    "headwater.stages.source",
    "headwater.stages.pretrain",
    "headwater.stages.sft",
    "headwater.stages.grpo",
    "headwater.stages.teacher_rollouts",
    "headwater.stages.warmup",
    "headwater.stages.sample_sft",
    "headwater.stages.opd",
    "headwater.evals.attempts",
    "headwater.evals.probe",
    "headwater.models.compatibility",
    "headwater.models.context_length",
    "headwater.workflow.run",
)


def preload() -> None:
    """Import all that a run and its workers import, so that forked ones begin at once."""
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Forked:
    """A forked process, as `WorkerProcess` asks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once it ends; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked", timeout or 0.0)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork(work: Callable[[], int], log: Path, keep: int | None = None) -> Forked:
    """Run `work` in a process group of its own; its return value is the exit code.

    log: what it prints. keep: the only descriptor it inherits.
    """
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        silence = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, silence), (1, said), (2, said)):
            os.dup2(source, target)
        kept = 3 if keep is None else keep
        os.closerange(3, kept)
        os.closerange(kept if keep is None else kept + 1, 4096)
        code = work()
    except HeadwaterError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = error.exit_code
    except KeyboardInterrupt:  # outside the stages, as the command line takes it
        code = Interrupted.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def launcher(prepare: Callable[[int], None]) -> Callable[[WorkerSetup, int, Path], Forked]:
    """Starts workers by forking; `prepare` is called in each with its number from 0 on."""
    count = 0

    def launch(_: WorkerSetup, descriptor: int, log: Path) -> Forked:
        nonlocal count
        number, count = count, count + 1

        def work() -> int:
            prepare(number)
            worker.main(descriptor)
            return 0

        return fork(work, log, keep=descriptor)

    return launch
