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
    save_file(dict(checkpoint.tensors), writing / "tensors.safetensors")
    digest = hashlib.sha256((writing / "tensors.safetensors").read_bytes()).hexdigest()
    state = {"tensors_sha256": digest, "state": checkpoint.state}
    (writing / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in writing.iterdir():
        _flush(file)
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
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            payload = (path / "tensors.safetensors").read_bytes()
        except (OSError, json.JSONDecodeError):
            continue
        if hashlib.sha256(payload).hexdigest() != record["tensors_sha256"]:
            continue
        return Checkpoint(load_file(path / "tensors.safetensors"), record["state"])
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
