"""Weights from memory to memory: both ends of a link in this process, one thread a worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.rollout.vllm_extension import headwater_link
from headwater.rollout.vllm_extension.headwater_link import Receiver, Sender, own_address, plan_of

CPU = torch.device("cpu")
KINDS = ("broadcast", "ipc")
CHUNK = 64

Named = list[tuple[str, torch.Tensor]]


class _End:
    """A worker that takes what comes, in its own thread."""

    def __init__(self, sender: Sender, rank: int) -> None:
        self._threads = ThreadPoolExecutor(1)
        self.joined = self._threads.submit(Receiver, sender.terms(rank, 1), 0, CPU)

    def take(self, plan: Any) -> Future[Named]:
        receiver = self.joined.result()
        return self._threads.submit(lambda: list(receiver.tensors(plan)))

    def leave(self) -> None:
        with suppress(Exception):
            self.joined.result().close()
        self._threads.shutdown()


@contextmanager
def _link(
    kind: str, workers: int = 1, seconds: float = 20.0
) -> Iterator[tuple[Sender, list[_End]]]:
    sender = Sender(kind, CPU, "127.0.0.1", workers, chunk_bytes=CHUNK, seconds=seconds)
    ends = [_End(sender, rank) for rank in range(1, workers + 1)]
    sender.connect(_watching([end.joined for end in ends]))
    try:
        yield sender, ends
    finally:
        sender.close()
        for end in ends:
            end.leave()


def _watching(asked: list[Future[Any]]) -> Callable[[], None]:
    def watch() -> None:
        for one in asked:
            if one.done():
                one.result()

    return watch


def _tensors(seed: int = 0) -> Named:
    """Of several formats and sizes: none, less than a chunk, over its edges, and many chunks."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("scalar", drawn()),
        ("none", drawn(0, 4)),
        ("odd", drawn(5).bfloat16()),
        ("large", drawn(33, 7)),
        ("turned", drawn(6, 9).T),
        ("whole", torch.arange(3)),
        ("flags", torch.tensor([True, False, True])),
    ]


def _same(found: Named, expected: Named) -> bool:
    return all(
        name == other and one.dtype == two.dtype and torch.equal(one, two)
        for (name, one), (other, two) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_gets_every_byte_of_every_push(kind: str, workers: int) -> None:
    with _link(kind, workers) as (sender, ends):
        for push in range(3):
            sent = _tensors(push)
            asked = [end.take(plan_of(sent)) for end in ends]
            sender.send(iter(sent), _watching(list(asked)))
            assert all(_same(one.result(20), sent) for one in asked)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_taken_is_its_own_memory(kind: str) -> None:
    with _link(kind) as (sender, (end,)):
        first, second = [("a", torch.ones(40))], [("a", torch.zeros(40))]
        taken = []
        for sent in (first, second):
            asked = end.take(plan_of(sent))
            sender.send(sent, _watching([asked]))
            taken.append(asked.result(20))
        assert _same(taken[0], first) and _same(taken[1], second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_fails_ends_the_waiting_with_its_error(kind: str) -> None:
    with _link(kind, seconds=60.0) as (sender, (end,)):
        sent = _tensors()
        wrong: Future[Any] = ThreadPoolExecutor(1).submit(_fails)
        with pytest.raises(KeyError, match="no such layer"):
            sender.send(sent, _watching([end.joined, wrong]))


def _fails() -> None:
    raise KeyError("no such layer")


@pytest.mark.parametrize("kind", KINDS)
def test_workers_are_told_when_the_trainer_is_gone(kind: str) -> None:
    """In the middle of a push, long before what they would wait for."""
    with _link(kind, seconds=300.0) as (sender, (end,)):
        asked = end.take(plan_of(_tensors()))
        sender.send([("scalar", torch.ones(CHUNK // 4))], _watching([asked]))
        sender.close()
        assert asked.exception(timeout=20) is not None


def test_a_worker_that_does_not_come_is_waited_for_only_so_long() -> None:
    sender = Sender("ipc", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=0.2)
    with pytest.raises(TimeoutError, match=r"no word of all workers within 0\.2 seconds"):
        sender.connect(lambda: None)
    sender.close()
    sender.close()  # harmless


def test_a_join_that_fails_ends_the_waiting(tmp_path: Path) -> None:
    sender = Sender("broadcast", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=60.0)
    wrong: Future[Any] = ThreadPoolExecutor(1).submit(_fails)
    with pytest.raises(KeyError, match="no such layer"):
        sender.connect(_watching([wrong]))
    sender.close()


def test_shared_memory_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Path] = []
    real = headwater_link._shared_file

    def noted(size: int) -> Path:
        made.append(real(size))
        assert made[-1].stat().st_mode & 0o777 == 0o600
        return made[-1]

    monkeypatch.setattr(headwater_link, "_shared_file", noted)
    with _link("ipc") as (sender, (end,)):
        assert made and not made[0].exists()  # both have it, nobody else can
        asked = end.take(plan_of(_tensors()))
        sender.send(_tensors(), _watching([asked]))
        assert _same(asked.result(20), _tensors())
    Sender("ipc", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=1.0).close()
    assert not any(one.exists() for one in made)


def test_too_little_shared_memory_is_said_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(number: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no shared memory of 64 bytes.*/dev/shm larger"):
        Sender("ipc", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=1.0)


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        ("broadcast", [{"device": "cuda", "id": "GPU-1"}], "NCCL takes one process a GPU"),
        ("broadcast", [{"device": "cpu", "id": ""}], "on a CPU and the trainer on a GPU"),
        ("broadcast", [{"device": "cuda", "id": "GPU-2"}], ""),
        ("ipc", [{"device": "cuda", "id": "GPU-1"}], ""),
    ],
)
def test_a_gpu_is_not_asked_for_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, kind: str, workers: list[dict[str, str]], message: str
) -> None:
    """The refusal alone: no GPU takes part."""
    sender = Sender(kind, CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=1.0)
    monkeypatch.setattr(sender, "_device", torch.device("cuda"))
    monkeypatch.setattr(headwater_link, "_device_id", lambda device: "GPU-1")
    assert message in sender._refused(workers)
    assert bool(sender._refused(workers)) == bool(message)
    sender.close()


def test_a_refusal_reaches_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender("broadcast", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=20.0)
    monkeypatch.setattr(sender, "_refused", lambda workers: "not with such a GPU")
    end = _End(sender, 1)
    with pytest.raises(ValueError, match="not with such a GPU"):
        sender.connect(_watching([end.joined]))
    assert "not with such a GPU" in str(end.joined.exception(20))
    sender.close()


def test_a_device_memory_handle_travels_as_text() -> None:
    parts = [b"\x00\xff", 12, True, b""]
    told = [headwater_link._encoded(part) for part in parts]
    assert [headwater_link._decoded(part) for part in told] == parts


def test_the_address_to_a_peer_is_on_its_way() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    assert threading.active_count() < 200  # links leave no threads behind
