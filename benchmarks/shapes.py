"""Models by shape: random weights from a seed, written once as a Hugging Face folder.

Speed and memory depend on a model's shape, not on what it has learned, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from headwater.errors import InputError
from headwater.models.loading import without_progress_bars
from headwater.models.size import SMOLLM2_CONFIG
from headwater.models.tiny_sizes import TINY_SIZES, tiny_config_values

#: The ids that the workloads leave out of prompts; the peer's word tokenizer uses them alike.
PAD_ID, END_ID, FIRST_WORD_ID = 0, 1, 3


def model_folder(model: str, workdir: Path, seed: int = 0) -> Path:
    """The folder of `model`: a folder that exists, or a shape made under `workdir` when missing.

    Shapes: "smollm2-135m", optionally with another vocabulary or depth
    ("smollm2-135m?vocab=262144&layers=12"), and "tiny:NAME". Raises InputError for anything else.
    """
    if (Path(model) / "config.json").is_file():
        return Path(model)
    name, _, changes = model.partition("?")
    if name != "smollm2-135m" and name.removeprefix("tiny:") not in TINY_SIZES:
        raise InputError(
            f"model {model!r} is neither a folder with a config.json nor a shape; expected "
            f"smollm2-135m or one of {', '.join(f'tiny:{known}' for known in TINY_SIZES)}"
        )
    folder = workdir / "models" / f"{model.translate(str.maketrans(':?&=', '----'))}-seed{seed}"
    if not (folder / "config.json").is_file():
        _write(_random_model(name, _overrides(model, changes), seed), folder)
    return folder


def _overrides(model: str, changes: str) -> dict[str, int]:
    keys = {"vocab": "vocab_size", "layers": "num_hidden_layers"}
    found = {}
    for change in filter(None, changes.split("&")):
        key, _, value = change.partition("=")
        if key not in keys or not value.isdigit():
            raise InputError(
                f"model {model!r}: {change!r} is not a change of shape; "
                "expected vocab=NUMBER or layers=NUMBER"
            )
        found[keys[key]] = int(value)
    return found


def _random_model(name: str, overrides: dict[str, int], seed: int) -> PreTrainedModel:
    ends = {"pad_token_id": PAD_ID, "eos_token_id": END_ID, "bos_token_id": None}
    torch.manual_seed(seed)
    if name != "smollm2-135m":
        return Qwen3(Qwen3Config(**(tiny_config_values(name) | overrides | ends)))
    values = {key: value for key, value in SMOLLM2_CONFIG.items() if key != "model_type"}
    config = LlamaConfig(
        **(values | overrides | ends),
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 100_000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        initializer_range=0.041666666666666664,
    )
    return LlamaForCausalLM(config)


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Written beside and renamed, so that an interrupted run leaves no half model."""
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    with without_progress_bars():
        model.to(torch.bfloat16).save_pretrained(staging)
    staging.rename(folder)


def config_of(folder: Path) -> dict[str, int]:
    """The values of config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
