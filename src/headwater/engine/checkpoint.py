"""Checkpoints of a stage: tensors and cursor together, published whole by one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headwater.plain_json import read_json_file

_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and everything else that must continue (steps, cursor, ledger position)."""

    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write `folder/step-N` beside the older one, flush it to disk, rename, then drop the older."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:09d}"
    writing = folder / f"writing-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    save_file(dict(checkpoint.tensors), writing / _TENSORS)
    record = {"tensors_sha256": _sha256(writing / _TENSORS), "state": checkpoint.state}
    sealed = record | {"record_sha256": _seal(record)}
    (writing / _STATE).write_text(json.dumps(sealed), encoding="utf-8")
    for path in (writing / _TENSORS, writing / _STATE, writing):
        _flush(path)
    if target.exists():
        shutil.rmtree(target)
    writing.rename(target)
    _flush(folder)
    for old in folder.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None; damaged ones (by hash) are passed over."""
    if not folder.is_dir():
        return None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = read_json_file(path / _STATE)
            sealed = record.pop("record_sha256") == _seal(record)
            whole = sealed and _sha256(path / _TENSORS) == record["tensors_sha256"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):  # torn or overwritten
            continue
        if whole:
            return Checkpoint(load_file(path / _TENSORS), record["state"])
    return None


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
