"""Weights from memory to memory: both ends of a link in this process, one thread a worker."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.rollout.vllm_extension.headwater_vllm import link, memory
from headwater.rollout.vllm_extension.headwater_vllm.link import Receiver, Sender, plan_of
from headwater.rollout.vllm_extension.headwater_vllm.memory import own_address

CPU = torch.device("cpu")
KINDS = ("broadcast", "ipc")
CHUNK = 64

Named = list[tuple[str, torch.Tensor]]


class _End:
    """A worker that takes what comes, in its own thread."""

    def __init__(self, sender: Sender, rank: int) -> None:
        self._threads = ThreadPoolExecutor(1)
        self.joined = self._threads.submit(Receiver, sender.terms(rank), 0, CPU)

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
def test_a_worker_that_fails_is_heard_by_all_others(kind: str) -> None:
    """Its server may answer only when its other workers do."""
    with _link(kind, workers=2, seconds=300.0) as (sender, (one, other)):
        asked = one.take(plan_of(_tensors()))
        other.joined.result().fail("out of something")
        with pytest.raises(RuntimeError, match="out of something"):
            sender.send(_tensors(), _watching([asked]))
        assert asked.exception(20) is not None


def test_a_worker_that_dies_before_the_group_is_made_ends_the_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long before what is waited for otherwise."""
    monkeypatch.setattr(memory, "_OPEN_SECONDS", 0.5)
    sender = Sender("broadcast", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=300.0)
    store = torch.distributed.TCPStore("127.0.0.1", sender.terms(1)["port"], is_master=False)
    store.set("here/1", '{"device": "cpu", "id": ""}')  # and nothing more
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="timeout"):
        sender.connect(lambda: None)
    assert time.monotonic() - began < 20
    sender.close()


def test_opening_a_group_is_left_where_it_is_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of NCCL, which nothing else ends."""
    released = threading.Event()
    monkeypatch.setattr(memory, "_group", lambda *ends: released.wait(30))
    with pytest.raises(KeyError, match="no such layer"):
        memory.opened_group((None, 0, 2, CPU, "127.0.0.1", 1.0), _fails)
    released.set()


@pytest.mark.parametrize("kind", KINDS)
def test_goodbye_is_heard_though_an_error_keeps_the_store(kind: str) -> None:
    """As a traceback does of the error that ended the trainer's part."""
    with _link(kind, seconds=300.0) as (sender, (end,)):
        held = sender._store
        asked = end.take(plan_of(_tensors()))
        sender.close()
        assert "trainer has left" in str(asked.exception(20)) or kind == "broadcast"
        assert held.check(["bye"])


def test_a_worker_that_comes_when_the_trainer_is_gone_gives_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "_CONNECT_SECONDS", 0.5)
    sender = Sender("ipc", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=300.0)
    terms = sender.terms(1)
    sender.close()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        Receiver(terms, 0, CPU)
    assert time.monotonic() - began < 30


def test_memory_that_is_not_the_trainers_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a server has a /dev/shm of its own: torch would make the file, full of zeros."""
    with pytest.raises(ValueError, match=r"not to be seen here.*share /dev/shm"):
        memory.mapped(tmp_path / "none", CHUNK)
    assert not (tmp_path / "none").exists()
    other = tmp_path / "other"
    other.write_bytes(bytes(CHUNK))
    monkeypatch.setattr(Sender, "_handle", lambda self: {"file": str(other)})
    sender = Sender("ipc", CPU, "127.0.0.1", 1, chunk_bytes=CHUNK, seconds=20.0)
    end = _End(sender, 1)
    with pytest.raises(ValueError, match="another memory than the trainer's"):
        sender.connect(_watching([end.joined]))
    sender.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_that_came_otherwise_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL does not say of a broadcast that failed that it did."""
    with _link(kind) as (sender, (end,)):
        asked = end.take(plan_of(_tensors()))
        monkeypatch.setattr(link, "sum_of", _counting())
        with pytest.raises(ValueError, match=r"came with the sum .*, and was sent with"):
            sender.send(_tensors(), _watching([asked]))


def _counting() -> Callable[[torch.Tensor], int]:
    """Another sum at every call: what was sent is never what came."""
    calls = iter(range(1_000_000))
    return lambda chunk: next(calls)


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
    real = memory.shared_file

    def noted(size: int) -> Path:
        made.append(real(size))
        assert made[-1].stat().st_mode & 0o777 == 0o600
        return made[-1]

    monkeypatch.setattr(link, "shared_file", noted)
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
    monkeypatch.setattr(link, "device_id", lambda device: "GPU-1")
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
    told = [memory._encoded(part) for part in parts]
    assert [memory._decoded(part) for part in told] == parts


def test_the_address_to_a_peer_is_on_its_way() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
