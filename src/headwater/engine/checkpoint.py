"""Checkpoints of a stage: tensors and cursor together, published whole by one rename.

Tensors lie in safetensors files: one of a process alone, one of each rank's parts where weights are
sharded. Either kind is read by any number of ranks (torch.distributed.checkpoint cuts them anew).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from headwater.plain_json import read_json_file
from headwater.storage import flush, flush_tree, sha256_of
from headwater.world import SOLO, World

_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and everything else that must continue (steps, cursor, ledger position)."""

    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A whole checkpoint on disk: its state, and where its tensors lie."""

    path: Path
    state: Mapping[str, Any]

    def read(self, into: Mapping[str, torch.Tensor]) -> None:
        """Fill these tensors, whole or this rank's parts of them; ranks call it together.

        Raises RuntimeError where one is not in the checkpoint or has another shape.
        """
        alone = not torch.distributed.is_initialized()
        reader = dcp.HuggingFaceStorageReader(str(self.path))
        with _first_error(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(into), storage_reader=reader, no_dist=alone)


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, world: World = SOLO) -> None:
    """Write `folder/step-N` beside the older one, flush it to disk, rename, then drop the older.

    At every moment the folder holds a whole checkpoint, if it ever held one. Ranks call it
    together: each writes its parts, the main one all else; all raise the error of one.
    """
    writing = world.from_main(lambda: _start(folder))
    _write(writing, checkpoint.tensors, world)
    world.from_main(lambda: _finish(folder, writing, step, checkpoint.state))


def _start(folder: Path) -> Path:
    writing = folder / f"writing-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        whole = {name: t.contiguous() for name, t in tensors.items()}  # the same on all ranks
        world.from_main(lambda: save_file(whole, folder / _TENSORS))
        return
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_error():
        dcp.save(dict(tensors), storage_writer=writer)


@contextmanager
def _first_error() -> Iterator[None]:
    """Raise what a rank raised, on all: torch wraps it in what is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        found, _ = next(iter(error.failures.values()))
        raise found from None


def _finish(folder: Path, writing: Path, step: int, state: Mapping[str, Any]) -> None:
    target = _free_name(folder, step)
    files = {path.name: sha256_of(path) for path in sorted(writing.glob("*.safetensors"))}
    record = {"files": files, "state": state}
    text = json.dumps(record | {"record_sha256": _seal(record)})
    (writing / _STATE).write_text(text, encoding="utf-8")
    flush_tree(writing)
    writing.rename(target)
    flush(folder)
    for old in folder.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> FoundCheckpoint | None:
    """The newest whole checkpoint, or None; damaged ones (by hash) are passed over."""
    if not folder.is_dir():
        return None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = read_json_file(path / _STATE)
            sealed = record.pop("record_sha256") == _seal(record)
            files = record["files"]
            whole = sealed and files.keys() == {f.name for f in path.glob("*.safetensors")}
            whole = whole and all(sha256_of(path / name) == found for name, found in files.items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):  # torn or overwritten
            continue
        if whole:
            return FoundCheckpoint(path, record["state"])
    return None


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _free_name(folder: Path, step: int) -> Path:
    """`step-N`, or with a point and a number where a stage is saved again at the same step.

    Names sort from old to new: the older checkpoint is needed until the newer is in place.
    """
    name = f"step-{step:09d}"
    taken = {path.name for path in folder.glob(f"{name}*")}
    if name not in taken:
        return folder / name
    last = max(int(one.removeprefix(name).removeprefix(".") or 0) for one in taken)
    return folder / f"{name}.{last + 1:03d}"
