"""vLLM in this process: what a recipe may say of it, and what is left of it in the process.

With a module that stands in for vLLM, and does to a process what the real one does.
"""

from __future__ import annotations

import gc
import importlib.machinery
import logging
import os
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from headwater.config.compute import VLLM, Compute, is_served
from headwater.config.loading import validate_recipe
from headwater.errors import InputError, StageError
from headwater.rollout import vllm_local
from headwater.rollout.vllm_extension.headwater_vllm import WeightsExtension
from headwater.rollout.vllm_local import VLLMLocal, check_installed, engine_arguments
from headwater.rollout.vllm_process import ServerSettings, server_arguments
from headwater.rollout.vllm_servers import Servers, StaleWeights
from headwater.workflow.devices import Offer, device_need
from test_cluster_plan import GRPO, known
from test_config import plain, refusal

TOP_K = {"targets": {"kind": "top_k", "k": 8}}
HERE = {"kind": "vllm", "in_process": True}


def _asking(**compute: Any) -> dict[str, Any]:
    return plain(compute=compute, stages={"opd": TOP_K, "warmup": TOP_K})


# --- recipes ----------------------------------------------------------------------------------


def test_vllm_in_this_process_reads_and_has_the_numbers_of_vllm() -> None:
    compute = validate_recipe(_asking(rollouts=HERE | {"sleeps": True}, scoring=HERE)).compute
    assert compute.rollouts == VLLM(in_process=True, sleeps=True)
    assert compute.engines_here == (compute.rollouts, compute.scoring)
    assert not is_served(compute.rollouts) and is_served(VLLM())
    served = Compute(rollouts=VLLM(), scoring=VLLM())
    assert compute.identity("opd") == served.identity("opd")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("urls", ["http://h"]),
        ("python", "p"),
        ("extra_args", ["--x"]),
        ("key_variable", "OTHER_API_KEY"),
        ("request_seconds", 5.0),
        ("startup_seconds", 5.0),
    ],
)
def test_what_is_said_to_servers_alone_is_refused(name: str, value: Any) -> None:
    text = "\n".join(refusal(_asking(rollouts=HERE | {name: value}, processes=1)))
    assert f"{name} with in_process=true" in text and "remove it, or in_process" in text


def test_a_resolved_recipe_says_them_as_they_are_by_default() -> None:
    said = VLLM(in_process=True).model_dump(mode="json")
    assert validate_recipe(_asking(rollouts=said)).compute.rollouts == VLLM(in_process=True)


@pytest.mark.parametrize("name", ["rollouts", "scoring"])
def test_ranks_have_no_engine_in_their_process(name: str) -> None:
    text = "\n".join(refusal(_asking(ranks=2, **{name: HERE})))
    assert f"compute.ranks=2 with compute.{name}.in_process=true: expected one" in text
    assert "set compute.ranks: 1" in text


def test_a_plan_leaves_an_engine_its_share_of_the_device_and_counts_no_servers() -> None:
    llama = known("meta-llama/Llama-3.2-1B")
    served, here = (
        Offer(count=64, compute=Compute(rollouts=VLLM(in_process=there))) for there in (False, True)
    )
    assert here.usable_bytes == pytest.approx(here.memory_bytes * 0.4)
    assert replace(here, packs_weights=True).usable_bytes == served.usable_bytes - 2**30
    assert device_need(GRPO, llama, None, served).servers > 0
    need = device_need(GRPO, llama, None, here)
    assert need.servers == 0 and need.ranks == 1


def test_an_engine_is_told_what_a_server_is_told() -> None:
    settings = ServerSettings(
        Path("m"), Path("log"), "float32", True, max_logprobs=7, max_model_len=99
    )
    for one in (settings, replace(settings, on_cpu=False, sleeps=True)):
        said = server_arguments(one, 1)
        for name, value in engine_arguments(one).items():
            flag = "--" + name.replace("_", "-")
            if name in ("distributed_executor_backend", "use_tqdm_on_load"):
                continue  # of an engine alone
            if name == "kv_cache_memory_bytes":  # a server reads it from its environment
                assert value == 2**30
            elif name == "worker_extension_cls":
                assert value.endswith(said[said.index(flag) + 1])
            elif isinstance(value, bool):
                assert flag.replace("--", "--" if value else "--no-", 1) in said
            else:
                assert said[said.index(flag) + 1] == str(value)


# --- an interpreter without vLLM --------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    threads = torch.get_num_threads()
    return ServerSettings(tmp_path, tmp_path / "vllm.log", "float32", True, threads=threads)


def test_an_interpreter_without_vllm_is_told_what_to_do(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for error, do in ((InputError, check_installed), (StageError, lambda: _local(settings))):
        with pytest.raises(error, match=r"no vLLM in this interpreter.*install_vllm\.py.*python: "):
            do()
    assert "VLLM_CONFIGURE_LOGGING" not in os.environ


def _local(settings: ServerSettings, in_flight: int = 8) -> VLLMLocal:
    return VLLMLocal(settings, in_flight=in_flight)


# --- a stand-in -------------------------------------------------------------------------------


class Worker(WeightsExtension):
    """With the extension as it is, and for a model a bag of parameters. keeps: not copies."""

    def __init__(self, keeps: bool = False) -> None:
        self.model_runner, self.keeps = self, keeps
        self.model = torch.nn.Module()
        self.model.logits_processor = torch.nn.Identity()

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights_iterator:
            taken = tensor if self.keeps else tensor.clone()
            self.model.register_parameter(name.replace(".", "/"), torch.nn.Parameter(taken))

    def state(self) -> dict[str, torch.Tensor]:
        return {n.replace("/", "."): one.detach() for n, one in self.model.named_parameters()}


@dataclass
class Engine:
    """Of the stand-in: answers with seeds, and takes over the process while it starts."""

    arguments: dict[str, Any]
    version: str = "default"
    most: int = 0
    loads: list[str] = field(default_factory=list)
    under_way: dict[str, Any] = field(default_factory=dict)
    fails_at: int = 1000
    worker: Worker = field(default_factory=lambda: Worker())
    on_cpu = True

    def __post_init__(self) -> None:
        if self.arguments["max_logprobs"] == 13:
            raise RuntimeError("no such model")
        os.environ["LD_PRELOAD"] = os.environ["LOCAL_WORLD_SIZE"] = "theirs"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        torch.set_num_threads = lambda count: None
        torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        logging.getLogger("httpx2").setLevel(logging.ERROR)
        logging.getLogger().addHandler(logging.NullHandler())
        sys.setrecursionlimit(sys.getrecursionlimit() + 7)
        sys.excepthook = lambda *_: None
        sys.path.append("theirs")
        gc.freeze()
        if not distributed.is_initialized():
            store = distributed.HashStore()
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        logging.getLogger("vllm.core").warning("started")
        names = types.SimpleNamespace
        model = names(max_model_len=64, max_logprobs=64, get_vocab_size=lambda: 63)
        model.logprobs_mode, model.dtype = "processed_logprobs", torch.float32
        self.vllm_config = names(model_config=model)
        self.engine_core = names(_finalizer=names(), shutdown=self._shutdown)

    def _shutdown(self) -> None:
        sys.modules["vllm.v1.engine.core"].cleanup_dist_env_and_memory()

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> Engine:
        return cls(arguments)

    def add_request(self, name: str, prompt: Any, params: dict[str, Any]) -> None:
        self.under_way[name] = (prompt, params)
        self.most = max(self.most, len(self.under_way))

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.under_way[name]

    def step(self) -> list[Any]:
        torch.rand(3)
        assert threading.current_thread() is not threading.main_thread()
        assert torch.Tensor.pin_memory(torch.ones(1)) == 1  # ours raises where there is no device
        name, (_, params) = next(iter(self.under_way.items()))
        seed = params["seed"]
        if seed == self.fails_at:
            raise RuntimeError("out of something")
        del self.under_way[name]
        span = types.SimpleNamespace(version=self.version, start=0, end=1)
        output = types.SimpleNamespace(
            token_ids=[seed % 60],
            weight_versions=[span],
            finish_reason="stop",
            logprobs=[{seed % 60: types.SimpleNamespace(logprob=-np.inf, rank=1)}],
        )
        one = types.SimpleNamespace(
            request_id=name, finished=True, outputs=[output], prompt_logprobs=None
        )
        return [one]

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def collective_rpc(self, method: str, args: tuple[Any, int]) -> list[Any]:
        assert args[1] == 60 and self.version == "loading"
        if method == "headwater_take":
            self.loads.append("live")
            return [self.worker.headwater_take(*args)]
        assert method == "headwater_load"
        if args[0].endswith("nowhere"):
            raise ValueError("nothing there")
        self.loads.append(args[0])
        return [{"head_gap": 0.0}]

    def reset_prefix_cache(self) -> bool:
        return True


def _clean() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with what `vllm_local` imports of vLLM, in a process that may log."""
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # a verifier's does not
    made = {
        "vllm": {"EngineArgs": dict, "LLMEngine": Engine, "SamplingParams": dict},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(is_cpu=lambda: Engine.on_cpu)},
        "vllm.sampling_params": {"RequestOutputKind": types.SimpleNamespace(FINAL_ONLY=2)},
        "vllm.envs": {"disable_envs_cache": lambda: None},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"cleanup_dist_env_and_memory": _clean},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.core": {"cleanup_dist_env_and_memory": _clean},
    }
    for name, content in made.items():
        module: Any = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stand-in")
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    yield
    assert vllm_local._home.engines == 0


def _state() -> dict[str, Any]:
    """What the stand-in changes, as the trainer's thread sees it."""
    return {
        "environment": dict(os.environ),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "torch": (torch.set_num_threads, torch.get_default_dtype(), torch.get_num_threads()),
        "precision": torch.get_float32_matmul_precision(),
        "pin_memory": vars(torch.Tensor).get("pin_memory"),
        "loggers": [
            (one.level, list(one.handlers)) for one in map(logging.getLogger, ("", "httpx2"))
        ],
        "hooks": (sys.excepthook, sys.getrecursionlimit(), list(sys.path), gc.get_freeze_count()),
        "group": distributed.is_initialized(),
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (*ours, ours_T), (*theirs, theirs_T) = one.pop("random"), other.pop("random")
    return one == other and ours == theirs and torch.equal(ours_T, theirs_T)


def _servers(settings: ServerSettings, **engine: Any) -> Servers:
    logging.getLogger("httpx2")
    return Servers(VLLM(in_process=True, **engine), settings, 60)


def _bodies(count: int) -> list[dict[str, Any]]:
    return [{"token_ids": [1, 2], "sampling_params": {"seed": seed}} for seed in range(count)]


def _engine(servers: Servers) -> Engine:
    (client,) = servers._clients
    assert isinstance(client, VLLMLocal)
    return client._engine


@pytest.mark.usefixtures("stand_in")
def test_the_process_is_as_it_was_while_an_engine_lives_in_it(settings: ServerSettings) -> None:
    logging.getLogger("httpx2")
    before = _state()
    with _servers(settings) as servers:
        servers.load(settings.model, 0)
        assert _same(_state(), dict(before))
        servers.ask(_bodies(3))
        servers.load(settings.model, 1)
        assert _same(_state(), dict(before))
        assert servers.info.max_model_len == 64 and servers.pid is None
    assert _same(_state(), dict(before))
    assert "vllm.core: started" in settings.log.read_text(encoding="utf-8")


@pytest.mark.usefixtures("stand_in")
def test_answers_come_in_order_of_no_more_at_once_than_asked(settings: ServerSettings) -> None:
    with _servers(settings, requests_in_flight=5) as servers:
        servers.load(settings.model, 0)
        answers = servers.ask(_bodies(24))
        assert [a["choices"][0]["token_ids"] for a in answers] == [[n] for n in range(24)]
        assert answers[3]["choices"][0]["logprobs"]["content"] == [
            {"token_id": 3, "logprob": -9999.0}
        ]
        engine = _engine(servers)
        assert engine.most == 5 and engine.loads == [str(settings.model.resolve())]
        assert engine.under_way == {}


@pytest.mark.usefixtures("stand_in")
def test_half_loaded_and_foreign_weights_are_believed_by_nobody(settings: ServerSettings) -> None:
    with _servers(settings) as servers:
        servers.load(settings.model, 0)
        with pytest.raises(StageError, match=r"nothing there.*compute\.rollouts.*vllm\.log"):
            servers.load(settings.model / "nowhere", 1)
        assert _engine(servers).version == "loading"
        servers.load(settings.model, 2)
        servers._after_load = lambda: _engine(servers).set_weight_version("another")
        servers._after_load()
        with pytest.raises(StaleWeights, match=r"vLLM in this process.*'another'"):
            servers.ask(_bodies(2))


@pytest.mark.usefixtures("stand_in")
def test_an_engine_that_fails_says_why_and_keeps_nothing_under_way(
    settings: ServerSettings,
) -> None:
    with _servers(settings) as servers:
        servers.load(settings.model, 0)
        _engine(servers).fails_at = 3
        with pytest.raises(StageError, match="out of something; correct what it says"):
            servers.ask(_bodies(9))
        assert _engine(servers).under_way == {}
        assert len(servers.ask(_bodies(2))) == 2


@pytest.mark.usefixtures("stand_in")
def test_two_engines_share_a_group_until_the_last_ends(settings: ServerSettings) -> None:
    first, second = _servers(settings), _servers(settings)
    first.load(settings.model, 0)
    second.load(settings.model, 0)
    second.close()
    assert vllm_local._home._other._group is not None
    assert len(first.ask(_bodies(2))) == 2
    first.close()
    assert vllm_local._home._other._group is None
    with _servers(settings) as third:
        third.load(settings.model, 0)
        assert len(third.ask(_bodies(2))) == 2


@pytest.mark.usefixtures("stand_in")
def test_an_engine_that_does_not_start_leaves_nothing(settings: ServerSettings) -> None:
    before = _state()
    with pytest.raises(StageError, match="no such model"):
        _local(replace(settings, max_logprobs=13))
    assert _same(_state(), before)


@pytest.mark.usefixtures("stand_in")
def test_a_start_that_is_interrupted_is_ended_when_it_is_done(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _state()
    started = Engine.__post_init__

    def slow(engine: Engine) -> None:
        signal.raise_signal(signal.SIGINT)  # heard by the main thread, which waits
        time.sleep(0.5)
        started(engine)

    monkeypatch.setattr(Engine, "__post_init__", slow)
    others = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker's ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            _local(settings)
    finally:
        signal.signal(signal.SIGINT, others)
    assert vllm_local._home.engines == 0
    assert _same(_state(), before)


@pytest.mark.usefixtures("stand_in")
def test_a_build_for_another_device_is_refused(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "on_cpu", False)
    with pytest.raises(StageError, match=r"computes on a CPU.*expected a build for a CPU"):
        _local(settings)


@pytest.mark.usefixtures("stand_in")
def test_a_process_of_a_group_is_refused(settings: ServerSettings) -> None:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(StageError, match=r"in_process .*expected a process alone.*torchrun"):
            _local(settings)
    finally:
        distributed.destroy_process_group()


@pytest.mark.usefixtures("stand_in")
def test_one_that_sleeps_is_not_asked(settings: ServerSettings) -> None:
    engine = _local(settings)
    engine._asleep = True
    with pytest.raises(StageError, match="sleeps"):
        engine.generate(_bodies(1), [None], [0])
    engine.close()
