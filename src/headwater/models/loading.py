"""Reading a model folder back: weights in one dtype, every one of them present."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from headwater.errors import InputError
from headwater.models.config_file import read_config
from headwater.models.safe_folder import needs_own_code, own_code_refused, require_safe_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_FACTORS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
)
"""Config keys of models that scale or cap what comes out of the head."""


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The causal language model in the folder `path`, in eval mode.

    dtype: of the weights in memory; device: a torch device; attn_implementation: the name
    transformers gives an attention ("sdpa", "eager", "flash_attention_2", ...).
    Raises InputError for a folder without a model or one that is not safe to load
    (`safe_folder`), for weights that do not fit the config
    (missing ones would otherwise be drawn at random), and for attention or a head that the
    engine does not compute.
    """
    require_model_folder(path)
    require_safe_folder(path)
    with without_progress_bars(), refusing_own_code(str(path)):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    require_all_weights(str(path), info)
    require_full_attention(model, str(path))
    require_plain_head(model, str(path))
    return model.to(device).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`.

    Raises InputError for a folder without one, or with one that has no chat template.
    """
    require_model_folder(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(
            f"model folder {path} has no tokenizer: expected tokenizer.json and "
            "tokenizer_config.json beside config.json; copy them there"
        )
    try:
        with refusing_own_code(str(path)):
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tokenizer in {path} does not load ({error}): expected one that transformers "
            "reads; download or export it again"
        ) from error
    require_chat_template(tokenizer, f"the tokenizer in {path}")
    return tokenizer


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype that the config.json in the folder `path` gives its weights; float32 if none.

    Raises InputError for a folder without a config.json.
    """
    require_model_folder(path)
    config = read_config(path)
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            f"{path / 'config.json'} has dtype {name!r}: expected a torch dtype such as bfloat16; "
            "correct it"
        )
    return dtype


def require_plain_head(model: PreTrainedModel, name: str) -> None:
    """Raise InputError unless the logits of `model` are its final hidden states times its head.

    The engine computes them so, a chunk at a time; a bias, a scale or a soft cap behind the head
    would be left out without a sign, and every probability be another model's.
    """
    head = model.get_output_embeddings()
    values = {key: getattr(model.config, key, None) for key in HEAD_FACTORS}
    extras = [f"{key}={value}" for key, value in values.items() if value not in (None, 1.0)]
    if getattr(head, "bias", None) is not None:
        extras.append("a bias in the output head")
    if extras:
        raise InputError(
            f"{name} changes its logits behind the head ({', '.join(extras)}): expected hidden "
            "states times head alone, as in Llama, Qwen, Mistral or SmolLM; choose such a model"
        )


def require_full_attention(model: PreTrainedModel, name: str) -> None:
    """Raise InputError for a model some of whose layers do not attend to the whole sequence.

    The engine computes full causal attention alone: a sliding window, or chunks, would show only
    in training, as an error or as another model's probabilities.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        found = f"sliding_window={window}" if window is not None else None
    else:
        others = sorted(set(kinds) - {"full_attention"})
        found = f"layers of {', '.join(others)}" if others else None
    if found is not None:
        raise InputError(
            f"{name} does not attend to the whole sequence in every layer ({found}): expected full "
            "attention, as in Llama, Qwen or SmolLM; choose such a model"
        )


def require_model_folder(path: Path) -> None:
    """Raise InputError unless `path` is a folder with a config.json."""
    if not path.is_dir():
        raise InputError(
            f"model folder {path} does not exist: expected a Hugging Face folder (config.json, "
            "*.safetensors, tokenizer.json); check the path"
        )
    if not (path / "config.json").is_file():
        raise InputError(
            f"model folder {path} has no config.json: expected a Hugging Face folder; give the "
            "folder that holds config.json, not the one above it"
        )


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise InputError unless the tokenizer, called `name` in the message, has a chat template."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{name} has no chat template: every prompt is encoded through one; add "
            "chat_template.jinja to the source folder, or choose an instruction-tuned model"
        )


def require_all_weights(name: str, info: dict, *, allow_unexpected: bool = True) -> None:
    """Raise InputError where transformers' loading info names weights that do not fit the config.

    Missing and misshapen ones never pass; unexpected ones (a head of another task, say)
    only with `allow_unexpected`.
    """
    kinds = ["missing_keys", "mismatched_keys"]
    kinds += [] if allow_unexpected else ["unexpected_keys"]
    wrong = {kind: sorted(str(entry) for entry in info[kind]) for kind in kinds if info[kind]}
    if wrong:
        found = "; ".join(
            f"{len(entries)} {kind.removesuffix('_keys')}, first {entries[0]}"
            for kind, entries in wrong.items()
        )
        raise InputError(
            f"{name} does not hold exactly the weights its config describes ({found}); expected "
            "every one of them, or a config that describes these"
        )


@contextmanager
def refusing_own_code(name: str) -> Iterator[None]:
    """Raise InputError where transformers would need code that comes with the model `name`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if needs_own_code(error):
            raise own_code_refused(name) from error
        raise


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch transformers' own progress bars off inside the block, and back as they were."""
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
