"""What the ends of a link are made of: groups, memory that processes share, and its bytes."""

from __future__ import annotations

import base64
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

#: Called while one side waits; raises where waiting is in vain.
Watch = Callable[[], None]

_POLL_SECONDS = 0.0002
_LOOK_SECONDS = 0.05
_OPEN_SECONDS = 30.0


def own_address(peer: str) -> str:
    """The address of this machine on the way to the machine `peer`."""
    family, _, _, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # of a datagram: nothing is sent
        return str(probe.getsockname()[0])


def opened_group(ends: tuple[Any, int, int, torch.device, str, float], watch: Watch) -> Any:
    """A group of the link's ends alone, whatever groups the process is in besides.

    All ends are known to be there. Should one be gone since, NCCL waits for ever: in a thread,
    which is left to itself where `watch` raises. gloo lets nobody look, and waits for a while.
    """
    found: Future[Any] = Future()

    def work() -> None:
        try:
            found.set_result(_group(*ends))
        except BaseException as error:  # raised by whoever waits
            found.set_exception(error)

    threading.Thread(target=work, daemon=True, name="headwater-link").start()
    while not found.done():
        watch()
        time.sleep(_LOOK_SECONDS / 10)
    return found.result()


def _group(
    store: Any, rank: int, size: int, device: torch.device, address: str, seconds: float
) -> Any:
    if device.type == "cpu":
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=min(_OPEN_SECONDS, seconds))
        options._devices = [gloo.create_device(hostname=own_address(address))]
        before = store.timeout
        store.set_timeout(options._timeout)
        group: Any = gloo(store, rank, size, options)
        store.set_timeout(before)
        group._set_default_timeout(timedelta(seconds=seconds))
        return group
    with torch.cuda.device(device), _errors_left_to_us():
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=seconds)
        group = distributed.ProcessGroupNCCL(store, rank, size, options)
        # a communicator is made by the first collective, which waits for all ends
        group.broadcast([torch.zeros(1, device=device)], distributed.BroadcastOptions()).wait()
        torch.cuda.synchronize(device)
    return group


@contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """A group made inside does not end the process when another end is gone."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def broadcast(group: Any, chunk: torch.Tensor, watch: Watch) -> None:
    """From rank 0 to all; ends the group where it fails or `watch` raises, which may know why."""
    options = distributed.BroadcastOptions()
    options.rootRank = 0
    looked = time.monotonic()
    try:
        work = group.broadcast([chunk], options)
        while not work.is_completed():
            if time.monotonic() - looked > _LOOK_SECONDS:
                watch()
                looked = time.monotonic()
            time.sleep(_POLL_SECONDS)
        work.wait()
    except BaseException as error:
        abort(group)
        if isinstance(error, RuntimeError):
            watch()
        raise


def abort(group: Any) -> None:
    with suppress(RuntimeError, AttributeError):  # ended already, or a torch that cannot
        group.abort()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)


def handle_of(buffer: torch.Tensor) -> dict[str, Any]:
    """How one other process finds a buffer of a GPU's memory. One for each who opens it: torch
    counts both, and keeps the memory until then."""
    parts = buffer.untyped_storage()._share_cuda_()
    return {"id": device_id(buffer.device), "parts": [_encoded(part) for part in parts[1:]]}


def buffer_of(handle: Mapping[str, Any]) -> torch.Tensor:
    """The buffer, uint8, that another process gave a handle of."""
    index = _device_with(handle["id"])
    parts = [_decoded(part) for part in handle["parts"]]
    storage = torch.UntypedStorage._new_shared_cuda(index, *parts)
    device = torch.device("cuda", index)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def sum_of(chunk: torch.Tensor) -> int:
    """The sum of a chunk's words of eight bytes, modulo 2^64, once they are there: NCCL does not
    say of a broadcast that failed that it did."""
    return int(chunk[: len(chunk) // 8 * 8].view(torch.int64).sum())


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_id(device: torch.device) -> str:
    """What tells a GPU from all others, whatever its number in this process."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_with(wanted: str) -> int:
    """The number that a GPU has in this process."""
    for index in range(torch.cuda.device_count()):
        if device_id(torch.device("cuda", index)) == wanted:
            return index
    raise ValueError(
        f"the GPU that trains ({wanted}) is not visible to the server: let it see that GPU, or use "
        "transfer=broadcast"
    )


def shared_file(size: int) -> Path:
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


def mapped(path: Path, size: int) -> torch.Tensor:
    """The bytes of a file that several processes write and read, uint8 [size].

    Raises ValueError where it is not there: torch would make one.
    """
    if not path.is_file() or path.stat().st_size != size:
        raise ValueError(
            f"{path}: the trainer's shared memory is not to be seen here: use transfer=broadcast, "
            "or let both share /dev/shm"
        )
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _encoded(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decoded(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part
