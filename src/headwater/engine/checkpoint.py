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
from headwater.storage import flush, flush_tree, sha256_of

_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, and everything else that must continue (steps, cursor, ledger position)."""

    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write `folder/step-N` beside the older one, flush it to disk, rename, then drop the older.

    At every moment the folder holds a whole checkpoint, if it ever held one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = _free_name(folder, step)
    writing = folder / f"writing-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    save_file(dict(checkpoint.tensors), writing / _TENSORS)
    record = {"tensors_sha256": sha256_of(writing / _TENSORS), "state": checkpoint.state}
    text = json.dumps(record | {"record_sha256": _seal(record)})
    (writing / _STATE).write_text(text, encoding="utf-8")
    flush_tree(writing)
    writing.rename(target)
    flush(folder)
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
            whole = sealed and sha256_of(path / _TENSORS) == record["tensors_sha256"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):  # torn or overwritten
            continue
        if whole:
            return Checkpoint(load_file(path / _TENSORS), record["state"])
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
