"""The trainer's tensors for vLLM in its process: of one version, copied, never written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.compute import VLLM, Compute
from headwater.errors import StageError
from headwater.models.saving import save_model
from headwater.models.tiny import tiny_model, tiny_tokenizer
from headwater.rollout.engines import Serving, make_sampler
from headwater.rollout.sampler import SampleRequest, SamplerSettings
from headwater.rollout.vllm_process import ServerSettings
from headwater.rollout.vllm_sampler import VLLMSampler
from headwater.rollout.vllm_servers import Servers, StaleWeights
from headwater.rollout.vllm_weights import LiveWeights
from test_vllm_local import Engine, Worker, stand_in

__all__ = ["stand_in"]  # the fixture
HERE = VLLM(in_process=True)


class _Trainer:
    """A weight and its version."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.version = 0
        self.changes_while_read = False

    def train(self) -> None:
        self.version += 1
        self.weight.data += 1.0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", self.weight.detach()
        if self.changes_while_read:
            self.train()

    def lent(self) -> LiveWeights:
        return LiveWeights(self.tensors, lambda: self.version, self.version)


@pytest.fixture
def servers(tmp_path: Path, stand_in: None) -> Iterator[Servers]:
    threads = torch.get_num_threads()
    settings = ServerSettings(tmp_path, tmp_path / "vllm.log", "float32", True, threads=threads)
    with Servers(HERE, settings, 60) as found:
        yield found


def _engine(servers: Servers) -> Engine:
    (client,) = servers._clients
    return client._engine  # type: ignore[union-attr]


def _ask(servers: Servers) -> list[Any]:
    return servers.ask([{"token_ids": [1, 2], "sampling_params": {"seed": 5}}])


def _told_otherwise(servers: Servers) -> None:
    _engine(servers).set_weight_version("another")


def test_what_the_trainer_does_next_changes_no_weight_of_vllm(servers: Servers) -> None:
    trainer = _Trainer()
    servers.load(trainer.lent(), 0)
    trainer.train()
    assert _engine(servers).worker.state()["a.weight"].tolist() == [1.0, 2.0]
    assert len(_ask(servers)) == 1  # an engine answers with older weights while others are trained
    servers.load(trainer.lent(), 1)
    assert _engine(servers).worker.state()["a.weight"].tolist() == [2.0, 3.0]


def test_weights_are_given_again_while_they_are_what_they_were(servers: Servers) -> None:
    servers.load(_Trainer().lent(), 0)
    _told_otherwise(servers)
    assert len(_ask(servers)) == 1
    assert _engine(servers).loads == ["live", "live"]


def test_weights_that_were_trained_on_are_not_given_again(servers: Servers) -> None:
    trainer = _Trainer()
    servers.load(trainer.lent(), 0)
    _told_otherwise(servers)
    trainer.train()
    with pytest.raises(StaleWeights, match=r"of version 0 again.*at version 1.*transfer=folder"):
        _ask(servers)
    engine = _engine(servers)
    assert engine.version == "loading" and engine.loads == ["live"]
    servers.load(trainer.lent(), 1)
    assert len(_ask(servers)) == 1


def test_weights_that_change_while_they_are_read_are_believed_by_nobody(servers: Servers) -> None:
    trainer = _Trainer()
    servers.load(trainer.lent(), 0)
    _told_otherwise(servers)
    trainer.changes_while_read = True
    with pytest.raises(StaleWeights, match="at version 1"):
        _ask(servers)
    assert _engine(servers).version == "loading"


@pytest.mark.usefixtures("stand_in")
def test_a_device_has_done_what_it_was_told_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    trainer, present = _Trainer(), lambda: told.append("version") or 0
    monkeypatch.setattr(Engine, "on_cpu", False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("settled"))
    settings = ServerSettings(tmp_path, tmp_path / "log", "float32", True, threads=1)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        told.append("read")
        yield from trainer.tensors()

    with Servers(HERE, replace(settings, on_cpu=False), 60) as servers:
        servers.load(LiveWeights(tensors, present, 0), 0)
    assert told == ["settled", "version", "read", "settled", "version"]


def test_an_engine_that_keeps_the_trainers_own_tensor_is_refused(servers: Servers) -> None:
    trainer = _Trainer()
    with pytest.raises(ValueError, match=r"the trainer's own a/weight, expected a copy"):
        Worker(keeps=True).headwater_take(trainer.tensors(), 60)
    servers.load(trainer.lent(), 0)
    _engine(servers).worker.keeps = True
    with pytest.raises(StageError, match="expected a copy"):
        servers.load(trainer.lent(), 1)
    assert _engine(servers).version == "loading"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_lends_what_it_would_write_and_writes_nothing(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """The model's head is its embedding: one tensor, under the embedding's name."""
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    model = tiny_model("tiny:student", seed=1)
    save_model(model, tiny_tokenizer(), source)
    compute = Compute(device="cpu", precision="float32", rollouts=HERE)
    settings = SamplerSettings(1.0, 4, (2,), 60)
    version = [0]
    with ExitStack() as closing:
        serving = Serving(source, scratch, closing, lambda: version[0])
        sampler = make_sampler(compute, model.to(dtype), settings, serving)
        assert isinstance(sampler, VLLMSampler)
        for version[0] in (0, 1):
            with torch.no_grad():
                model.get_input_embeddings().weight += 1.0
            sampler.push([SampleRequest((5,), (1,))])  # one token: no scores to compare
            taken = _engine(sampler.servers).worker.state()
            written = load_file(sampler.policy.write(tmp_path / "written") / "model.safetensors")
            assert taken.keys() == written.keys() and "lm_head.weight" not in taken
            assert all(torch.equal(taken[name], written[name]) for name in taken)
            assert {one.dtype for one in taken.values()} == {dtype}
        own = {one.data_ptr() for one in model.parameters()}
        assert {one.data_ptr() for _, one in sampler.policy.tensors()} == own
    assert [one.name for one in scratch.rglob("*") if one.is_file()] == ["server.log"]


def test_weights_in_parts_on_ranks_are_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie between a push and the next, when a server that was started again needs them."""
    source = tmp_path / "source"
    model = tiny_model("tiny:student", seed=1)
    save_model(model, tiny_tokenizer(), source)
    with ExitStack() as closing:
        compute = Compute(device="cpu", precision="float32", rollouts=VLLM(transfer="ipc"))
        serving = Serving(source, tmp_path, closing)
        sampler = make_sampler(compute, model, SamplerSettings(1.0, 4, (2,), 60), serving)
        assert isinstance(sampler, VLLMSampler)
        assert len(list(sampler.policy.tensors())) > 10
        monkeypatch.setattr("headwater.rollout.engines.DTensor", torch.nn.Parameter)
        with pytest.raises(StaleWeights, match=r"in parts on the ranks.*transfer=folder"):
            sampler.policy.tensors()
