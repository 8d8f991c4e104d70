"""Where a run computes: what of it is refused, at load or once this machine is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwater import api
from headwater.config.compute import Compute
from headwater.config.loading import validate_recipe
from headwater.engine.precision import check_devices
from headwater.errors import InputError
from test_config import plain, refusal


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        ({"ranks": 2, "device": "cpu"}, ["cpu_offload=true with compute.device=cpu", "remove"]),
        ({"device": "cuda"}, ["cpu_offload=true with compute.ranks=1", "compute.ranks >= 2"]),
    ],
)
def test_offloading_without_gpus_or_shares_is_refused(
    compute: dict[str, Any], words: list[str]
) -> None:
    said = " ".join(refusal(plain(compute=compute | {"cpu_offload": True})))
    assert all(word in said for word in [*words, "expected"]), said
    assert validate_recipe(plain(compute=compute)).compute.cpu_offload is False


def test_offloading_of_ranks_reads() -> None:
    assert validate_recipe(plain(compute={"ranks": 2, "cpu_offload": True})).compute.cpu_offload


@pytest.mark.parametrize(
    ("gpus", "ranks", "compute", "words"),
    [
        (2, 3, {}, "compute.ranks=3 on a machine with 2 GPUs .*expected.*compute.ranks <= 2"),
        (0, 1, {"device": "cuda"}, "compute.device=cuda, but torch sees no CUDA device"),
        (0, 2, {"cpu_offload": True}, "compute.cpu_offload=true, but .*expected.*remove"),
    ],
)
def test_gpus_that_are_not_there_are_told_of(
    gpus: int, ranks: int, compute: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _have(gpus, monkeypatch)
    with pytest.raises(InputError, match=words):
        check_devices(Compute(**compute), ranks)


@pytest.mark.parametrize(
    ("gpus", "ranks", "compute"),
    [(2, 2, {"cpu_offload": True}), (1, 4, {"device": "cpu"}), (0, 4, {}), (1, 1, {})],
)
def test_ranks_that_find_their_gpus_or_need_none(
    gpus: int, ranks: int, compute: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _have(gpus, monkeypatch)
    check_devices(Compute(**compute), ranks)


def _have(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("nproc", "ray", "words"),
    [
        (3, None, "--nproc 3 under torchrun, which started 2 .*expected.*leave --nproc out"),
        (None, "auto", "--ray auto under torchrun, which started 2 .*expected.*run headwater"),
    ],
)
def test_ranks_are_started_once(
    rank: str, nproc: int | None, ray: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=words):
        api.follow(nproc, ray)


def test_the_main_rank_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.follow(3, "auto") is False
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert api.follow(2) is False
