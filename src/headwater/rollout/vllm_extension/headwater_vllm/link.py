"""How weights reach vLLM servers without a folder: from memory to memory, in chunks of one buffer.

Loaded by the trainer, rank 0 of a link, and by each worker of each server, the ranks from 1 on; on
their side as a part of this package alone, so that nothing but torch is imported here.

    broadcast   a torch.distributed group: NCCL between GPUs, gloo between CPUs, of any machines
    ipc         a buffer that all of them map: of the GPU that trains, or of a CPU's shared memory

A plan says which tensors come. Their bytes are one stream, cut where the buffer is full, so that
neither side holds more than the buffer beside its weights; each chunk comes with its sum. Each
side looks after the other while it waits: the trainer at its requests to the servers and at the
word of a worker that failed, a worker at that and at the trainer's goodbye.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .memory import (
    Watch,
    abort,
    broadcast,
    buffer_of,
    bytes_of,
    device_id,
    handle_of,
    mapped,
    opened_group,
    settle,
    shared_file,
    sum_of,
)

#: Name, format and shape of each tensor, in the order in which they come.
Plan = Sequence[tuple[str, str, Sequence[int]]]

BROADCAST, IPC = "broadcast", "ipc"
#: Keys of the store: the trainer's word to begin, and to end; a worker that failed says why.
_GO, _BYE, _FAILED = "go", "bye", "failed"
_POLL_SECONDS = 0.0002
_CONNECT_SECONDS = 30.0
_TOKEN_BYTES = 16


def plan_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, str, list[int]]]:
    """The plan of these tensors."""
    return [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors
    ]


class Sender:
    """The trainer's end of a link.

    kind: `broadcast` or `ipc`. device: where the weights are, a GPU with its number. address: of
    this machine, as the workers reach it. workers: how many there are. seconds: how long one side
    waits for another. `name` tells the link from those that others open to the same servers.
    """

    def __init__(
        self,
        kind: str,
        device: torch.device,
        address: str,
        workers: int,
        *,
        chunk_bytes: int,
        seconds: float,
    ) -> None:
        """Raises ValueError where there is too little shared memory."""
        self._kind, self._device, self._address = kind, device, address
        self._ranks = range(1, workers + 1)
        self._chunk_bytes, self._seconds = chunk_bytes, seconds
        self.name = secrets.token_hex(8)
        wait = timedelta(seconds=seconds)
        self._store: Any = distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait
        )
        self._file: Path | None = None
        self._group: Any = None
        self._sent = 0
        if kind == IPC and device.type == "cpu":
            self._file = shared_file(chunk_bytes)
            self._buffer = mapped(self._file, chunk_bytes)
        else:
            self._buffer = torch.empty(chunk_bytes, dtype=torch.uint8, device=device)

    def terms(self, first_rank: int) -> dict[str, Any]:
        """What the workers of one server have to know to join, as JSON; theirs are the ranks from
        `first_rank` on."""
        return {
            "name": self.name,
            "kind": self._kind,
            "device": self._device.type,
            "address": self._address,
            "port": self._store.port,
            "first_rank": first_rank,
            "size": len(self._ranks) + 1,
            "chunk_bytes": self._chunk_bytes,
            "seconds": self._seconds,
        }

    def connect(self, watch: Watch) -> None:
        """Wait for all workers. Raises ValueError where one cannot take what this end gives."""
        here = [f"here/{rank}" for rank in self._ranks]
        self._wait_for(here, watch)
        refused = self._refused([json.loads(self._store.get(key)) for key in here])
        self._store.set(_GO, refused)
        if refused:
            raise ValueError(refused)
        if self._kind == BROADCAST:
            self._group = opened_group(
                (self._store, 0, len(self._ranks) + 1, self._device, self._address, self._seconds),
                self._watching(watch),
            )
            return
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._buffer[:_TOKEN_BYTES] = torch.tensor(list(token), dtype=torch.uint8)
        settle(self._device)
        for rank in self._ranks:
            told = {"token": token.hex(), **self._handle()}
            self._store.set(f"buffer/{rank}", json.dumps(told))
        self._wait_for([f"mapped/{rank}" for rank in self._ranks], watch)
        self._unlink()

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], watch: Watch) -> None:
        """Give the tensors of the plan that the workers were told, in its order."""
        filled = 0
        for _, tensor in tensors:
            flat = bytes_of(tensor.detach().contiguous())
            done = 0
            while done < len(flat):
                size = min(len(flat) - done, self._chunk_bytes - filled)
                self._buffer[filled : filled + size].copy_(flat[done : done + size])
                done, filled = done + size, filled + size
                if filled == self._chunk_bytes:
                    self._give(filled, watch)
                    filled = 0
        if filled:
            self._give(filled, watch)

    def close(self) -> None:
        """Leave; workers that still wait are told so."""
        self._unlink()
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(_BYE, "")  # whoever still holds the store, they need not wait
        if self._group is not None:
            abort(self._group)
        self._group = self._store = None
        self._buffer = torch.empty(0)

    def _give(self, size: int, watch: Watch) -> None:
        number, self._sent = self._sent, self._sent + 1
        chunk = self._buffer[:size]
        self._store.set(f"chunk/{number}", json.dumps([size, sum_of(chunk)]))
        if self._group is not None:
            broadcast(self._group, chunk, self._watching(watch))
        taken = [f"taken/{number}/{rank}" for rank in self._ranks]
        self._wait_for(taken, watch)
        for key in (*taken, f"chunk/{number}"):
            self._store.delete_key(key)

    def _wait_for(self, keys: Sequence[str], watch: Watch) -> None:
        look, until = self._watching(watch), time.monotonic() + self._seconds
        while not self._store.check(list(keys)):
            look()
            if time.monotonic() > until:
                raise TimeoutError(f"no word of all workers within {self._seconds:g} seconds")
            time.sleep(_POLL_SECONDS)

    def _watching(self, watch: Watch) -> Watch:
        """`watch`, and whether a worker has failed: its server may wait for others to answer."""
        store = self._store

        def look() -> None:
            watch()
            if store.check([_FAILED]):
                raise RuntimeError(store.get(_FAILED).decode())

        return look

    def _refused(self, workers: Sequence[Mapping[str, str]]) -> str:
        """Why a link with such workers is impossible; empty where it is not."""
        if self._device.type == "cpu":
            return ""
        if any(one["device"] != self._device.type for one in workers):
            return "the server computes on a CPU and the trainer on a GPU: use transfer=folder"
        own = device_id(self._device)
        if self._kind == BROADCAST and any(one["id"] == own for one in workers):
            return (
                "the server computes on the GPU that trains, and NCCL takes one process a GPU: use "
                "transfer=ipc, or give the server another GPU"
            )
        return ""

    def _handle(self) -> dict[str, Any]:
        """How one worker finds the buffer that is shared."""
        if self._file is not None:
            return {"file": str(self._file)}
        return handle_of(self._buffer)

    def _unlink(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None


class Receiver:
    """A worker's end of a link.

    terms: of `Sender.terms`. number: of the worker in its server. device: where it computes.
    """

    def __init__(self, terms: Mapping[str, Any], number: int, device: torch.device) -> None:
        """Raises ValueError where the trainer refuses, and what torch raises where it is gone."""
        self.name = str(terms["name"])
        self._chunk_bytes, self._seconds = int(terms["chunk_bytes"]), float(terms["seconds"])
        self._device = device if terms["device"] == device.type else torch.device("cpu")
        self._rank, self._taken = int(terms["first_rank"]) + number, 0
        self._group: Any = None
        address, port = terms["address"], int(terms["port"])
        soon = timedelta(seconds=min(_CONNECT_SECONDS, self._seconds))
        self._store: Any = distributed.TCPStore(address, port, is_master=False, timeout=soon)
        self._store.set_timeout(timedelta(seconds=self._seconds))
        here = {"device": device.type, "id": device_id(device)}
        self._store.set(f"here/{self._rank}", json.dumps(here))
        if refused := self._answer_at(_GO).decode():
            raise ValueError(refused)
        if terms["kind"] == BROADCAST:
            self._buffer = torch.empty(self._chunk_bytes, dtype=torch.uint8, device=self._device)
            self._group = opened_group(
                (self._store, self._rank, terms["size"], self._device, address, self._seconds),
                self._look,
            )
        else:
            self._buffer = self._opened(json.loads(self._answer_at(f"buffer/{self._rank}")))
            self._store.set(f"mapped/{self._rank}", "")

    def tensors(self, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a plan as they come, each in memory of its own."""
        shapes = [(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in plan]
        left = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in shapes)
        size = used = 0
        for name, dtype, shape in shapes:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            flat = bytes_of(tensor)
            done = 0
            while done < len(flat):
                if used == size:
                    size, used = min(left, self._chunk_bytes), 0
                    self._take(size)
                    left -= size
                part = min(len(flat) - done, size - used)
                flat[done : done + part].copy_(self._buffer[used : used + part])
                done, used = done + part, used + part
                if used == size:
                    self._leave()
            yield name, tensor

    def fail(self, said: str) -> None:
        """Tell the trainer and the other workers, who wait for this one, and leave the link."""
        with suppress(RuntimeError):
            self._store.set(_FAILED, said)
        self.close()

    def close(self) -> None:
        """Leave the link."""
        if self._group is not None:
            abort(self._group)
        self._group = self._store = None
        self._buffer = torch.empty(0)

    def _take(self, size: int) -> None:
        """Wait until the next chunk is in the buffer, where it stays until `_leave`.

        Raises ValueError for another than was sent.
        """
        found, total = json.loads(self._answer_at(f"chunk/{self._taken}"))
        if found != size:
            raise ValueError(f"a chunk of {found} bytes came, expected {size} by the plan")
        chunk = self._buffer[:size]
        if self._group is not None:
            broadcast(self._group, chunk, self._look)
        if (got := sum_of(chunk)) != total:
            raise ValueError(f"a chunk came with the sum {got}, and was sent with {total}")

    def _leave(self) -> None:
        settle(self._device)
        self._store.set(f"taken/{self._taken}/{self._rank}", "")
        self._taken += 1

    def _answer_at(self, key: str) -> bytes:
        until = time.monotonic() + self._seconds
        while not self._store.check([key]):
            self._look()
            if time.monotonic() > until:
                raise TimeoutError(f"no word of the trainer within {self._seconds:g} seconds")
            time.sleep(_POLL_SECONDS)
        found: bytes = self._store.get(key)
        return found

    def _look(self) -> None:
        """Raises RuntimeError where the trainer or another worker has ended the link."""
        if self._store.check([_BYE]):
            raise RuntimeError("the trainer has left the link")
        if self._store.check([_FAILED]):
            raise RuntimeError(f"another worker failed: {self._store.get(_FAILED).decode()}")

    def _opened(self, handle: Mapping[str, Any]) -> torch.Tensor:
        if "file" in handle:
            buffer = mapped(Path(handle["file"]), self._chunk_bytes)
        else:
            buffer = buffer_of(handle)
        if bytes(buffer[:_TOKEN_BYTES].tolist()).hex() != handle["token"]:
            raise ValueError(
                "another memory than the trainer's was found under its name: use "
                "transfer=broadcast, or let both share /dev/shm"
            )
        return buffer
