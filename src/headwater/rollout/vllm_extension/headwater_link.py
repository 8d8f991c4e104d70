"""How weights reach vLLM servers without a folder: from memory to memory, in chunks of one buffer.

Loaded by the trainer, rank 0 of a link, and by each worker of each server, the ranks from 1 on; on
their side with this folder on the PYTHONPATH, so that nothing but torch is imported here.

    broadcast   a torch.distributed group: NCCL between GPUs, gloo between CPUs, of any machines
    ipc         a buffer that all of them map: of the GPU that trains, or of a CPU's shared memory

A plan says which tensors come. Their bytes are one stream, cut where the buffer is full, so that
neither side holds more than the buffer beside its weights. Each side looks after the other while
it waits: the trainer at its requests to the servers, a worker at the trainer's store.
"""

from __future__ import annotations

import base64
import json
import math
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

#: Name, format and shape of each tensor, in the order in which they come.
Plan = Sequence[tuple[str, str, Sequence[int]]]
#: Called while one side waits; raises where waiting is in vain.
Watch = Callable[[], None]

BROADCAST, IPC = "broadcast", "ipc"
_GO, _HERE, _MAPPED = "go", "here", "mapped"
_POLL_SECONDS = 0.0002
_LOOK_SECONDS = 0.05


def plan_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, str, list[int]]]:
    """The plan of these tensors."""
    return [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors
    ]


class Sender:
    """The trainer's end of a link.

    kind: `broadcast` or `ipc`. device: where the weights are. address: of this machine, as the
    workers reach it. workers: how many there are. seconds: how long one side waits for another.
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
        self._kind, self._device, self._address, self._workers = kind, device, address, workers
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
            self._file = _shared_file(chunk_bytes)
            self._buffer = _mapped(self._file, chunk_bytes)
        else:
            self._buffer = torch.empty(chunk_bytes, dtype=torch.uint8, device=device)

    def terms(self, first_rank: int, workers: int) -> dict[str, Any]:
        """What the workers of one server have to know to join, as JSON; theirs are the ranks from
        `first_rank` on."""
        return {
            "name": self.name,
            "kind": self._kind,
            "device": self._device.type,
            "address": self._address,
            "port": self._store.port,
            "first_rank": first_rank,
            "size": self._workers + 1,
            "chunk_bytes": self._chunk_bytes,
            "seconds": self._seconds,
            "buffers": [self._handle() for _ in range(workers)],
        }

    def connect(self, watch: Watch) -> None:
        """Wait for all workers. Raises ValueError where one cannot take what this end gives."""
        keys = [f"{_HERE}/{rank}" for rank in range(1, self._workers + 1)]
        self._wait_for(keys, watch)
        refused = self._refused([json.loads(self._store.get(key)) for key in keys])
        self._store.set(_GO, refused)
        if refused:
            raise ValueError(refused)
        if self._kind == BROADCAST:
            own = {"address": self._address, "seconds": self._seconds}
            self._group = _group(self._store, 0, self._workers + 1, self._device, own)
        else:
            self._wait_for([f"{_MAPPED}/{rank}" for rank in range(1, self._workers + 1)], watch)
            self._unlink()

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], watch: Watch) -> None:
        """Give the tensors of the plan that the workers were told, in its order."""
        filled = 0
        for _, tensor in tensors:
            flat = _bytes_of(tensor.detach().contiguous())
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
        """Leave; workers that still wait are told so by the connection that ends."""
        self._unlink()
        if self._group is not None:
            _abort(self._group)
        self._group = self._store = None
        self._buffer = torch.empty(0)

    def _give(self, size: int, watch: Watch) -> None:
        if self._group is not None:
            _broadcast(self._group, self._buffer[:size], watch)
            return
        _settle(self._device)
        number, self._sent = self._sent, self._sent + 1
        taken = [f"{number}/{rank}" for rank in range(1, self._workers + 1)]
        self._store.set(str(number), str(size))
        self._wait_for(taken, watch)
        for key in (*taken, str(number)):
            self._store.delete_key(key)

    def _wait_for(self, keys: Sequence[str], watch: Watch) -> None:
        until = time.monotonic() + self._seconds
        while not self._store.check(list(keys)):
            watch()
            if time.monotonic() > until:
                raise TimeoutError(f"no word of all workers within {self._seconds:g} seconds")
            time.sleep(_POLL_SECONDS)

    def _refused(self, workers: Sequence[Mapping[str, str]]) -> str:
        """Why a link with such workers is impossible; empty where it is not."""
        if self._device.type == "cpu":
            return ""
        if any(one["device"] != self._device.type for one in workers):
            return "the server computes on a CPU and the trainer on a GPU: use transfer=folder"
        own = _device_id(self._device)
        if self._kind == BROADCAST and any(one["id"] == own for one in workers):
            return (
                "the server computes on the GPU that trains, and NCCL takes one process a GPU: use "
                "transfer=ipc, or give the server another GPU"
            )
        return ""

    def _handle(self) -> dict[str, Any] | None:
        """How a worker finds the buffer that is shared; None where none is."""
        if self._kind != IPC:
            return None
        if self._file is not None:
            return {"file": str(self._file)}
        # One export for each who opens it: torch counts both, and keeps the memory until then.
        parts = self._buffer.untyped_storage()._share_cuda_()
        return {"id": _device_id(self._device), "parts": [_encoded(part) for part in parts[1:]]}

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
        self._kind, self._chunk_bytes = terms["kind"], int(terms["chunk_bytes"])
        self._device = device if terms["device"] == device.type else torch.device("cpu")
        self._rank, self._taken = int(terms["first_rank"]) + number, 0
        wait = timedelta(seconds=terms["seconds"])
        self._store: Any = distributed.TCPStore(
            terms["address"], int(terms["port"]), is_master=False, timeout=wait
        )
        here = {"device": device.type, "id": _device_id(device)}
        self._store.set(f"{_HERE}/{self._rank}", json.dumps(here))
        if refused := self._store.get(_GO).decode():
            raise ValueError(refused)
        self._group: Any = None
        if self._kind == BROADCAST:
            self._group = _group(self._store, self._rank, int(terms["size"]), self._device, terms)
        else:
            self._buffer = self._opened(terms["buffers"][number])
            self._store.set(f"{_MAPPED}/{self._rank}", "")

    def tensors(self, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a plan as they come, each in memory of its own."""
        shapes = [(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in plan]
        left = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in shapes)
        chunk, used = torch.empty(0, dtype=torch.uint8), 0
        for name, dtype, shape in shapes:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            flat = _bytes_of(tensor)
            done = 0
            while done < len(flat):
                if used == len(chunk):
                    chunk, used = self._take(min(left, self._chunk_bytes)), 0
                    left -= len(chunk)
                size = min(len(flat) - done, len(chunk) - used)
                flat[done : done + size].copy_(chunk[used : used + size])
                done, used = done + size, used + size
                if used == len(chunk):
                    self._leave()
            yield name, tensor

    def close(self) -> None:
        """Leave the link."""
        if self._group is not None:
            _abort(self._group)
        self._group = self._store = None
        self._buffer = torch.empty(0)

    def _take(self, size: int) -> torch.Tensor:
        """The next chunk; it is the buffer's own until `_leave`."""
        if self._group is not None:
            chunk = torch.empty(size, dtype=torch.uint8, device=self._device)
            _broadcast(self._group, chunk, self._trainer_is_there)
            return chunk
        found = int(self._store.get(str(self._taken)))
        if found != size:
            raise ValueError(f"a chunk of {found} bytes came, expected {size} by the plan")
        return self._buffer[:size]

    def _leave(self) -> None:
        if self._group is None:
            _settle(self._device)
            self._store.set(f"{self._taken}/{self._rank}", "")
            self._taken += 1

    def _trainer_is_there(self) -> None:
        self._store.check([_GO])

    def _opened(self, handle: Mapping[str, Any]) -> torch.Tensor:
        if "file" in handle:
            return _mapped(Path(handle["file"]), self._chunk_bytes)
        index = _device_with(handle["id"])
        parts = [_decoded(part) for part in handle["parts"]]
        storage = torch.UntypedStorage._new_shared_cuda(index, *parts)
        device = torch.device("cuda", index)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def own_address(peer: str) -> str:
    """The address of this machine on the way to the machine `peer`."""
    family, _, _, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # of a datagram: nothing is sent
        return str(probe.getsockname()[0])


def _group(store: Any, rank: int, size: int, device: torch.device, terms: Mapping[str, Any]) -> Any:
    """A group of the link's ends alone, whatever groups the process is in besides."""
    timeout = timedelta(seconds=terms["seconds"])
    if device.type == "cpu":
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timeout
        options._devices = [gloo.create_device(hostname=own_address(terms["address"]))]
        return gloo(store, rank, size, options)
    torch.cuda.set_device(device)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return distributed.ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: Any, chunk: torch.Tensor, watch: Watch) -> None:
    """From rank 0 to all; ends the group where `watch` raises."""
    options = distributed.BroadcastOptions()
    options.rootRank = 0
    work = group.broadcast([chunk], options)
    looked = time.monotonic()
    try:
        while not work.is_completed():
            if time.monotonic() - looked > _LOOK_SECONDS:
                watch()
                looked = time.monotonic()
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _abort(group)
        raise
    work.wait()


def _abort(group: Any) -> None:
    with suppress(RuntimeError, AttributeError):  # ended already, or a torch that cannot
        group.abort()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)


def _settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_id(device: torch.device) -> str:
    """What tells a GPU from all others, whatever its number in this process."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_with(wanted: str) -> int:
    """The number that a GPU has in this process."""
    for index in range(torch.cuda.device_count()):
        if _device_id(torch.device("cuda", index)) == wanted:
            return index
    raise ValueError(
        f"the GPU that trains ({wanted}) is not visible to the server: let it see that GPU, or use "
        "transfer=broadcast"
    )


def _shared_file(size: int) -> Path:
    """A new file in memory, of which all bytes are there, for this user alone."""
    memory = Path("/dev/shm")  # noqa: S108 - mkstemp makes the name
    folder = memory if os.access(memory, os.W_OK) else None
    number, name = tempfile.mkstemp(prefix="headwater-weights-", dir=folder)
    try:
        os.posix_fallocate(number, 0, size)  # or the first write beyond memory ends the process
    except OSError as error:
        Path(name).unlink()
        raise ValueError(
            f"{name}: no shared memory of {size} bytes ({error.strerror}): make /dev/shm larger, "
            "or use transfer=broadcast"
        ) from None
    finally:
        os.close(number)
    return Path(name)


def _mapped(path: Path, size: int) -> torch.Tensor:
    """The bytes of a file that several processes write and read, uint8 [size]."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _encoded(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decoded(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part
