"""A vLLM server of our own: started for a model folder, waited for, and ended for certain.

vLLM lives in an environment of its own, so it is a program here, never an import. The server
listens on this machine only, asks for a key that is made at random for it, and ends with this
process however that ends (`vllm_extension/supervise.py`), and we end what is left of it when only
its leader is killed. That both are killed at one instant is left to vLLM's own watch.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from headwater.errors import StageError
from headwater.redaction import redact, without_secrets

_EXTENSION = Path(__file__).parent / "vllm_extension"
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 10.0
_STARTS = 3  # a port may be taken between choosing it and listening there
_LAST_LINES = 12
_LAST_CHARACTERS = 2_000
_INSTALL = (
    "install vLLM in an environment of its own and name its interpreter, for instance "
    "compute.rollouts={kind: vllm, python: .venv-vllm/bin/python} (docs/clusters.md)"
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server is started with.

    dtype: of weights and arithmetic, "float32" or "bfloat16". max_logprobs: the most that one
    position may be asked for. on_cpu: no device, `threads` threads, and memory for keys and
    values counted in GiB instead of a share. log: where the server writes what it says.
    """

    model: Path
    log: Path
    dtype: str
    on_cpu: bool
    python: str | None = None
    threads: int = 1
    max_model_len: int | None = None
    max_logprobs: int = 64
    gpu_memory_utilization: float = 0.5
    cpu_cache_gib: int = 1
    sleeps: bool = False
    startup_seconds: float = 600.0
    extra_args: tuple[str, ...] = ()


class ServerProcess:
    """A running server. Use as a context manager, or call `stop`."""

    def __init__(self, settings: ServerSettings) -> None:
        """Start it and wait until it answers.

        Raises StageError, with the log's last lines, where it ends first or takes longer than
        `startup_seconds`.
        """
        self._settings = settings
        self.key = secrets.token_urlsafe(32)
        started = time.monotonic()
        for attempt in range(1, _STARTS + 1):
            self._port = _free_port()
            self._process = self._launch()
            leader = self._process.pid
            threading.Thread(target=_end_group_with, args=(leader,), daemon=True).start()
            try:
                if self._answers(started):
                    break
            except BaseException:
                self.stop()
                raise
            self.stop()
            if "address already in use" not in self.last_words().lower() or attempt == _STARTS:
                raise StageError(
                    f"the vLLM server for {settings.model} ended before it answered; {_INSTALL}, "
                    f"and read {settings.log}, which ends with:\n{self.last_words()}"
                )
        self.startup_seconds = time.monotonic() - started

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The leader of the server's process group."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it is still running."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The end of its log, without what looks secret."""
        try:
            with self._settings.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_CHARACTERS))
                text = file.read().decode(errors="replace")
        except OSError:
            return "(no log)"
        lines = redact(text.replace(self.key, "[redacted]")).splitlines()[-_LAST_LINES:]
        return "\n".join(lines) or "(nothing)"

    def stop(self) -> None:
        """End it and all its children; harmless when it has ended."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(_STOP_SECONDS)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        python = settings.python or sys.executable
        command = [
            *(sys.executable, "-I", str(_EXTENSION / "supervise.py"), str(os.getpid())),
            *(python, "-m", "vllm.entrypoints.openai.api_server"),
            *server_arguments(settings, self._port),
        ]
        with settings.log.open("ab") as said:
            said.write(f"--- {' '.join(command[4:])}\n".encode())
            said.flush()
            return subprocess.Popen(  # noqa: S603 - the interpreter that the recipe names
                command,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=server_environment(settings, self.key, os.environ),
                process_group=0,
            )

    def _answers(self, started: float) -> bool:
        """Wait until the server answers; False when it ended instead."""
        limit = self._settings.startup_seconds
        with httpx2.Client(base_url=self.url, timeout=5.0, trust_env=False) as client:
            while self.is_alive():
                with suppress(httpx2.HTTPError):
                    if client.get("/health").status_code == 200:
                        return True
                if time.monotonic() - started > limit:
                    raise StageError(
                        f"the vLLM server for {self._settings.model} has not answered after "
                        f"{limit:g} seconds; raise compute.rollouts.startup_seconds, or read "
                        f"{self._settings.log}, which ends with:\n{self.last_words()}"
                    )
                time.sleep(_LOOK_SECONDS)
        return False


def server_arguments(settings: ServerSettings, port: int) -> list[str]:
    """The server's command line, after the module's name.

    Log-probabilities are those of the distribution that is drawn from. Nothing of the model's
    generation config applies, and no tokenizer is loaded: prompts and responses are token ids.
    """
    named: dict[str, object] = {
        "--model": settings.model,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": settings.dtype,
        "--logprobs-mode": "processed_logprobs",
        "--max-logprobs": settings.max_logprobs,
        "--generation-config": "vllm",
        "--seed": 0,
        "--worker-extension-cls": "headwater_vllm.WeightsExtension",
        "--middleware": "headwater_vllm.Gate",
        "--uvicorn-log-level": "warning",
    }
    if settings.max_model_len is not None:
        named["--max-model-len"] = settings.max_model_len
    if not settings.on_cpu:
        named["--gpu-memory-utilization"] = settings.gpu_memory_utilization
    flags = ["--skip-tokenizer-init", "--enable-scale-out", "--disable-log-stats"]
    if settings.on_cpu:  # prompts in pieces and seeds of their own end the engine there
        flags += ["--no-enable-chunked-prefill", "--enforce-eager"]
    elif settings.sleeps:
        flags.append("--enable-sleep-mode")
    pairs = [text for name, value in named.items() for text in (name, str(value))]
    return [*pairs, *flags, *settings.extra_args]


def server_environment(
    settings: ServerSettings, key: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """The server's environment: ours without secrets and Python paths, and what vLLM reads."""
    kept = without_secrets(dict(environment))
    for name in ("PYTHONHOME", "PYTHONSTARTUP", "VLLM_SERVER_DEV_MODE", "VLLM_PLUGINS"):
        kept.pop(name, None)
    kept |= {
        "PYTHONPATH": str(_EXTENSION),
        "PYTHONUNBUFFERED": "1",
        "VLLM_API_KEY": key,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.on_cpu:
        kept |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or every server takes the first core
            "OMP_NUM_THREADS": str(settings.threads),
            "TORCHDYNAMO_DISABLE": "1",  # the first request would compile for half a minute
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # three times less to import
        }
    return kept


def _end_group_with(leader: int) -> None:
    """Wait for a group's leader, and end the rest of the group: somebody else killed it."""
    with suppress(ChildProcessError):  # waited for already
        os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
