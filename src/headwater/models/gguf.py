"""GGUF files as ordinary models: dequantised to float32, the quantisation marker gone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.errors import InputError
from headwater.models.loading import require_all_weights, without_progress_bars
from headwater.models.saving import rebuild
from headwater.models.source_names import (
    GGUF_INSTALL,
    require_gguf_file,
    require_gguf_packages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer of the GGUF file `path`.

    Raises InputError where the file, or a package that reads it, is missing, and where
    transformers does not know the file's architecture.
    """
    require_gguf_file(path)
    require_gguf_packages(GGUF_INSTALL)
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **_of_file(path))
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **_of_file(path)
            )
    except (ValueError, KeyError, NotImplementedError, struct.error) as error:
        raise InputError(
            f"{path} does not load as a GGUF model ({error}): expected an architecture and a "
            "quantisation that transformers reads; give the original model as hf:ID"
        ) from error
    require_all_weights(str(path), info)
    return rebuild(model), tokenizer


def _of_file(path: Path) -> dict[str, Any]:
    """Only this file: nothing is fetched, and no code that lies beside it is run."""
    return {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
