"""A stage's servers that are given weights through a link. With a program that stands in for
vLLM; the link, its processes and its bytes are real."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from headwater.config.compute import VLLM
from headwater.errors import StageError
from headwater.rollout import vllm_link
from headwater.rollout.vllm_process import ServerProcess, ServerSettings
from headwater.rollout.vllm_servers import Servers, StaleWeights
from headwater.rollout.vllm_weights import LiveWeights
from test_vllm_servers import _misbehave, settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")

__all__ = ["settings"]  # the fixture
KINDS = ("broadcast", "ipc")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller than the weights."""
    monkeypatch.setitem(vllm_link._CHUNK_BYTES, "cpu", 64)


class _Trainer:
    """100 weights and their version."""

    def __init__(self) -> None:
        self.weight = torch.arange(100.0)
        self.version = 0

    def train(self) -> None:
        self.version += 1
        self.weight += 1.0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", self.weight

    def lent(self) -> LiveWeights:
        return LiveWeights(self.tensors, lambda: self.version, self.version)


def _ask(servers: Servers, count: int = 6) -> list[Any]:
    return servers.ask(
        [
            {"token_ids": [1, 2, 3], "sampling_params": {"seed": seed, "max_tokens": 4}}
            for seed in range(count)
        ]
    )


def _state(url: str) -> dict[str, Any]:
    return httpx2.get(f"{url}/state").json()  # type: ignore[no-any-return]


def _own_state(servers: Servers) -> dict[str, Any]:
    assert servers._process is not None
    return _state(servers._process.url)


@pytest.mark.parametrize("kind", KINDS)
def test_every_push_brings_the_weights_of_its_version(settings: ServerSettings, kind: str) -> None:
    trainer = _Trainer()
    with Servers(VLLM(transfer=kind), settings, 60) as servers:
        assert servers.take_tensors
        for version in range(3):
            servers.load(trainer.lent(), version)
            assert len(_ask(servers)) == 6
            trainer.train()
        state = _own_state(servers)
    assert state["joins"] == 1 and state["loads"] == 3
    assert state["sums"] == [4950.0, 5050.0, 5150.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_by_this_side(settings: ServerSettings, tmp_path: Path, kind: str) -> None:
    """As a teacher's is: its server need not see the folder."""
    save_file({"b": torch.ones(3), "a": torch.full((40,), 2.0)}, tmp_path / "model.safetensors")
    with Servers(VLLM(transfer=kind), settings, 60) as servers:
        servers.load(tmp_path, 0)
        assert _own_state(servers)["sums"] == [83.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_taking_weights_is_started_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    _misbehave(monkeypatch, dies_taking=True, once=str(tmp_path / "died"))
    with Servers(VLLM(transfer=kind), settings, 60) as servers:
        servers.load(_Trainer().lent(), 4)
        assert servers.restarts == 1 and (tmp_path / "died").exists()
        assert set(_own_state(servers)["sums"]) == {4950.0} and len(_ask(servers)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_answering_is_given_them_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    _misbehave(monkeypatch, dies_after=3, once=str(tmp_path / "died"))
    with Servers(VLLM(transfer=kind, requests_in_flight=2), settings, 60) as servers:
        servers.load(_Trainer().lent(), 4)
        assert len(_ask(servers)) == 6 and servers.restarts == 1
        assert _own_state(servers)["sums"] == [4950.0]


def test_weights_that_were_trained_on_cannot_be_given_to_a_server_started_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _misbehave(monkeypatch, dies_after=3, once=str(tmp_path / "died"))
    trainer = _Trainer()
    with Servers(VLLM(transfer="ipc", requests_in_flight=1), settings, 60) as servers:
        servers.load(trainer.lent(), 0)
        trainer.train()  # as with `overlap`, while it is asked
        with pytest.raises(StaleWeights, match=r"version 0 again.*at version 1.*transfer=folder"):
            _ask(servers)
        servers.load(trainer.lent(), 1)
        assert len(_ask(servers)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_a_server_forgot_is_made_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As of a server at an address that its owner has started again since."""
    trainer = _Trainer()
    with Servers(VLLM(transfer=kind), settings, 60) as servers:
        servers.load(trainer.lent(), 0)
        assert servers._process is not None
        headers = {"Authorization": f"Bearer {servers._process.key}"}
        httpx2.post(f"{servers._process.url}/headwater/leave", json={"link": None}, headers=headers)
        servers.load(trainer.lent(), 1)
        state = _own_state(servers)
    assert state["joins"] == 2 and state["sums"] == [4950.0, 4950.0]


def test_a_server_that_always_forgets_is_quoted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, forgets=100)
    with (
        Servers(VLLM(transfer="broadcast"), settings, 60) as servers,
        pytest.raises(StageError, match=r"(?s)answers 500 to /headwater/weights: .*no link"),
    ):
        servers.load(_Trainer().lent(), 0)


def test_several_engines_at_one_address_are_refused(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, info={"copies": 2})
    with (
        Servers(VLLM(transfer="broadcast"), settings, 60) as servers,
        pytest.raises(StageError, match=r"several engines behind one address.*transfer=folder"),
    ):
        servers.load(_Trainer().lent(), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_servers_at_addresses_share_one_link_and_outlive_it(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr("headwater.rollout.vllm_process.secrets.token_urlsafe", lambda _: "one-key")
    monkeypatch.setenv("VLLM_API_KEY", "one-key")
    with ExitStack() as closing:
        processes = [
            closing.enter_context(ServerProcess(replace(settings, log=tmp_path / f"{n}.log")))
            for n in range(2)
        ]
        urls = tuple(process.url for process in processes)
        for stage in range(2):  # one after another, as stages come
            with Servers(VLLM(transfer=kind, urls=urls), settings, 60) as servers:
                servers.load(_Trainer().lent(), 0)
                assert len(_ask(servers)) == 6
            states = [_state(url) for url in urls]
            assert [one["sums"] for one in states] == [[4950.0] * (stage + 1)] * 2
            assert [one["left"] for one in states] == [stage + 1] * 2


def test_an_error_of_this_side_is_said_and_nobody_waits(settings: ServerSettings) -> None:
    trainer = _Trainer()

    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        if broken:
            raise RuntimeError("CUDA out of something")
        broken.append(True)  # the plan was made
        yield from trainer.tensors()

    broken: list[bool] = []
    with Servers(VLLM(transfer="ipc"), settings, 60) as servers:
        with pytest.raises(StageError, match=r"not be given to http.*CUDA out of something"):
            servers.load(LiveWeights(breaks, lambda: 0, 0), 0)
        servers.load(trainer.lent(), 0)
        assert _own_state(servers)["sums"] == [4950.0]


def test_a_link_knows_its_gpu_by_number(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is made in a thread, where the GPU in use is the first, not the one that trains."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    on_gpu = replace(settings, on_cpu=False)
    assert Servers(VLLM(transfer="broadcast"), on_gpu, 60)._device == torch.device("cuda", 3)
    assert Servers(VLLM(transfer="ipc"), settings, 60)._device == torch.device("cpu")
