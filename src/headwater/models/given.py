"""A model and tokenizer that a program holds, written to a folder named by its content."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.models.saving import save_model
from headwater.storage import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_given(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write both to `folder/HASH`, unless they are there already; returns that path.

    The same weights thus are the same source, and what was trained from them is found again.
    Raises InputError for a tokenizer without a chat template.
    """
    writing = folder / f"writing-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    save_model(model, tokenizer, writing)
    files = sorted(path for path in writing.rglob("*") if path.is_file())
    hashes = "\n".join(f"{path.relative_to(writing)} {sha256_of(path)}" for path in files)
    target = folder / hashlib.sha256(hashes.encode()).hexdigest()[:16]
    if target.is_dir():
        shutil.rmtree(writing)
    else:
        writing.rename(target)
    return target
