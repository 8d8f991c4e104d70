"""vLLM's engine inside this process, with the methods of a server's client.

The engine's own class for offline use, stepped here: no server, no port, no second interpreter.
All engines of a process live in one thread of their own, because vLLM keeps what it is about in
module variables, and so that what belongs to a thread (memory policy, gradient mode, OpenMP) stays
there. Before and after each call the process is the trainer's (`process_state.py`).

Weights are loaded by the same extension as a server's, but from the trainer's own tensors, of which
vLLM makes copies. Answers carry the same labels of the weights that drew them, and have the form of
/inference/v1/generate.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import distributed

from headwater.errors import InputError, StageError
from headwater.rollout.process_state import OtherSide, kept_randomness, left_as_found
from headwater.rollout.vllm_client import Json, ServerInfo
from headwater.rollout.vllm_extension import headwater_vllm
from headwater.rollout.vllm_process import ServerSettings
from headwater.rollout.vllm_weights import LiveWeights, Weights

T = TypeVar("T")

_EXTENSION = f"{headwater_vllm.__name__}.{headwater_vllm.WeightsExtension.__name__}"
#: What vLLM replaces of torch where it computes on a CPU.
_REPLACED: tuple[tuple[object, str], ...] = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
    *((torch.cuda, n) for n in ("Event", "Stream", "set_stream", "current_stream", "stream")),
    *((torch.accelerator, n) for n in ("synchronize", "empty_cache", "get_memory_info")),
)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or the engine starts a process for its worker
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first request would compile for a quarter of a minute
}
#: Of no probability, as a server says it.
_LEAST = -9999.0
_INSTALL = (
    "install vLLM beside headwater (on a CPU with .ci/install_vllm.py, docs/clusters.md), or name "
    "the interpreter that has it, without in_process: compute.rollouts={kind: vllm, python: "
    ".venv-vllm/bin/python}"
)


class VLLMLocal:
    """One model's engine in this process; starts when it is made, and ends with `close`.

    settings: as a server's, of which `python`, `startup_seconds` and `extra_args` mean nothing.
    in_flight: requests that the engine has at once.
    """

    url = "vLLM in this process"

    def __init__(self, settings: ServerSettings, *, in_flight: int) -> None:
        """Raises StageError where vLLM is not installed here, or does not take the model."""
        if distributed.is_initialized():
            raise StageError(
                "compute.rollouts.in_process (or compute.scoring's) in a process of a "
                "torch.distributed group: expected a process alone, because vLLM makes a group of "
                "its own; start headwater without torchrun, or let the stage start a server "
                "(remove in_process)"
            )
        self._settings, self._in_flight = settings, in_flight
        self._engine: Any = None
        self._params: Callable[..., Any]
        self._asleep = self._ending = False
        self._log = _log_file(settings)
        began = time.monotonic()
        try:
            self._here(self._start, _home.starting)
        except BaseException:
            self.close()
            raise
        self.startup_seconds = time.monotonic() - began

    def close(self) -> None:
        """End the engine and free its memory; what is being generated is given up."""
        self._ending = True
        self._here(self._end, _home.starting)
        self._log.close()

    def info(self) -> ServerInfo:
        """What the engine is."""
        config = self._engine.vllm_config
        model = config.model_config
        return ServerInfo(
            vocab_size=model.get_vocab_size(),
            max_model_len=model.max_model_len,
            max_logprobs=model.max_logprobs,
            logprobs_mode=str(model.logprobs_mode),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def load(self, weights: Weights, version: str, vocab_size: int) -> None:
        """Let it answer with copies of these weights, as `version`.

        Raises StageError for weights that cannot be loaded, StaleWeights for live ones that have
        changed; answers then carry the label LOADING.
        """

        def load() -> None:
            engine = self._engine
            engine.set_weight_version(headwater_vllm.LOADING)
            if isinstance(weights, LiveWeights):
                self._unchanged(weights)
                engine.collective_rpc("headwater_take", args=(weights.tensors(), vocab_size))
                self._unchanged(weights)
            else:
                engine.collective_rpc("headwater_load", args=(str(weights.resolve()), vocab_size))
            if not engine.reset_prefix_cache():
                raise StageError("the prefix cache still holds keys and values of old weights")
            engine.set_weight_version(version)

        self._here(load, _home.starting)

    def sleep(self) -> None:
        """Move its weights to the host's memory and forget its cache; it answers nothing then."""
        self._here(lambda: self._engine.sleep(1), _home.working)
        self._asleep = True

    def wake(self) -> None:
        """Take its weights back, those that were loaded last."""
        self._here(lambda: self._engine.wake_up(None), _home.working)
        self._asleep = False

    def generate(
        self, bodies: Sequence[Json], answers: list[Json | None], places: Sequence[int]
    ) -> None:
        """Ask for `bodies[p]` at each of `places` that has no answer, and keep it in `answers[p]`.

        Answers that came are kept when one fails. Raises StageError.
        """
        if self._asleep:
            raise StageError(f"{self.url} sleeps; expected wake() before anything is asked")
        asked = [place for place in places if answers[place] is None]
        self._here(lambda: self._generate(bodies, answers, asked), _home.working)

    # --- in the engine's thread -------------------------------------------------------------------

    def _here(self, do: Callable[[], T], how: Callable[[], Any]) -> T:
        """What `do` returns, called in the thread of the engines."""

        def called() -> T:
            with how(), _heard_by(self._log):
                return do()

        try:
            return _home.thread().submit(called).result()
        except StageError:
            raise
        except Exception as error:  # the border to vLLM: anything may come
            raise StageError(
                f"{self.url}: {type(error).__name__}: {error}; correct what it says, let the "
                "stage start a server (remove in_process), or use compute.rollouts: in_process "
                f"(compute.scoring for a teacher); its log is {self._settings.log}"
            ) from error

    def _start(self) -> None:
        settings = self._settings
        os.environ.update(_environment(settings))
        try:
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind

            from vllm import EngineArgs, LLMEngine, SamplingParams
        except ImportError as error:
            raise StageError(f"no vLLM in this interpreter ({error}); {_INSTALL}") from error
        self._params = partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY)
        if current_platform.is_cpu() != settings.on_cpu:
            wanted = "a CPU" if settings.on_cpu else "a GPU"
            raise StageError(
                f"the stage computes on {wanted}, and the vLLM that is installed here does not; "
                f"expected a build for {wanted}: install that, or set compute.device"
            )
        torch.set_num_threads(settings.threads)
        warnings.simplefilter("ignore")
        try:
            arguments = EngineArgs(**engine_arguments(settings))
            self._engine = LLMEngine.from_engine_args(arguments)
        except BaseException:
            _home.clean()
            raise
        self._engine.engine_core._finalizer.atexit = False  # the process ends without it
        _home.engines += 1

    def _unchanged(self, weights: LiveWeights) -> None:
        if not self._settings.on_cpu:  # the trainer writes in another stream than vLLM reads in
            torch.cuda.synchronize()
        weights.check()

    def _end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:  # it has not started, or has ended
            return
        _home.engines -= 1
        with _home.group_kept():
            engine.engine_core.shutdown()
        del engine
        _home.clean()
        gc.collect()

    def _generate(
        self, bodies: Sequence[Json], answers: list[Json | None], asked: Sequence[int]
    ) -> None:
        engine, waiting, under_way = self._engine, iter(asked), set[str]()
        try:
            while True:
                while len(under_way) < self._in_flight:
                    place = next(waiting, None)
                    if place is None:
                        break
                    self._add(str(place), bodies[place])
                    under_way.add(str(place))
                if not under_way:
                    return
                if self._ending:
                    raise StageError(f"{self.url} was closed while it generated")
                for found in engine.step():
                    if found.finished:
                        answers[int(found.request_id)] = _as_served(found)
                        under_way.remove(found.request_id)
        finally:
            if under_way:  # what failed must not answer later
                engine.abort_request(list(under_way))

    def _add(self, name: str, body: Json) -> None:
        prompt = {"prompt_token_ids": list(body["token_ids"])}
        self._engine.add_request(name, prompt, self._params(**body["sampling_params"]))


def check_installed() -> None:
    """Raises InputError where this interpreter has no vLLM; imports nothing."""
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a mere folder of that name has none
        raise InputError(f"no vLLM in this interpreter; {_INSTALL}")


def engine_arguments(settings: ServerSettings) -> dict[str, Any]:
    """The engine's arguments: what `vllm_process.server_arguments` says to a server."""
    named: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": settings.max_logprobs,
        "generation_config": "vllm",
        "seed": 0,
        "worker_extension_cls": _EXTENSION,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
        "use_tqdm_on_load": False,
    }
    if settings.max_model_len is not None:
        named["max_model_len"] = settings.max_model_len
    if settings.on_cpu:  # prompts in pieces and seeds of their own end the engine there
        named |= {"enable_chunked_prefill": False, "enforce_eager": True}
        named["kv_cache_memory_bytes"] = settings.cpu_cache_gib << 30
    else:
        named["gpu_memory_utilization"] = settings.gpu_memory_utilization
        named["enable_sleep_mode"] = settings.sleeps
    return named


def _environment(settings: ServerSettings) -> dict[str, str]:
    """What vLLM reads while it starts."""
    if not settings.on_cpu:
        return {k: v for k, v in _ENVIRONMENT.items() if k != "TORCHDYNAMO_DISABLE"}
    return _ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gib)}


def _as_served(found: Any) -> Json:
    """An output of the engine as /inference/v1/generate has it."""
    (output,) = found.outputs
    if output.finish_reason not in ("stop", "length"):
        raise StageError(f"vLLM gave a request up ({output.finish_reason}); read its log")
    spans = [
        {"version": span.version, "start": span.start, "end": span.end}
        for span in output.weight_versions or ()
    ]
    ids = list(output.token_ids)
    answer: dict[str, Any] = {"choices": [{"token_ids": ids, "weight_versions": spans}]}
    if output.logprobs is not None:
        content = [
            {"token_id": token, "logprob": _finite(at[token].logprob)}
            for token, at in zip(ids, output.logprobs, strict=True)
        ]
        answer["choices"][0]["logprobs"] = {"content": content}
    if found.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [_scored(at) for at in found.prompt_logprobs]
    return answer


def _scored(at: Mapping[int, Any] | None) -> dict[str, Any] | None:
    """What could have stood at one place of a prompt; None at the first."""
    if at is None:
        return None
    return {str(t): {"logprob": _finite(one.logprob), "rank": one.rank} for t, one in at.items()}


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST  # NaN too


def _log_file(settings: ServerSettings) -> logging.Handler:
    settings.log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(settings.log, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    return handler


@contextmanager
def _heard_by(handler: logging.Handler) -> Iterator[None]:
    """What vLLM says goes to this log, and nowhere else."""
    logger = logging.getLogger("vllm")
    before = logger.level, logger.handlers, logger.propagate
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        _, logger.handlers, logger.propagate = before


class _Home:
    """The thread of this process that engines live in, and what they share there."""

    def __init__(self) -> None:
        self.engines = 0
        self._other = OtherSide(_REPLACED)
        self._thread: ThreadPoolExecutor | None = None

    def thread(self) -> ThreadPoolExecutor:
        """The one thread that any engine is called in."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm-engine")
        return self._thread

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what an engine does while the trainer may go on.

        Nothing of a trainer's draws from torch's own generators, which are put back at the end.
        """
        with kept_randomness(), self._other.inside():
            yield

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around what the trainer waits for: starts, ends, and new weights."""
        with left_as_found(), self._other.inside(), self._other.their_group():
            yield

    @contextmanager
    def group_kept(self) -> Iterator[None]:
        """An engine that ends leaves the process group, which others may share, to `clean`."""
        from vllm.v1.engine import core

        shared = core.cleanup_dist_env_and_memory
        core.cleanup_dist_env_and_memory = lambda *_, **__: None
        try:
            yield
        finally:
            core.cleanup_dist_env_and_memory = shared

    def clean(self) -> None:
        """Once there is no engine, end the process group and forget the environment's variables."""
        if self.engines:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        from vllm import envs

        cleanup_dist_env_and_memory()
        envs.disable_envs_cache()


_home = _Home()
