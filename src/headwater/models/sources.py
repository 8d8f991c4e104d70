"""From a source's name to a Hugging Face folder: weights, config, tokenizer, template, end ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.errors import InputError
from headwater.models.gguf import load_gguf
from headwater.models.loading import (
    load_model,
    load_tokenizer,
    refusing_own_code,
    require_all_weights,
    require_full_attention,
    require_plain_head,
    stored_dtype,
    without_progress_bars,
)
from headwater.models.prune import prune_layers
from headwater.models.safe_folder import require_safe_folder
from headwater.models.saving import save_model
from headwater.models.source_names import (
    Source,
    SourceKind,
    describe_source,
    require_available,
    smollm2_path,
)
from headwater.models.tiny import tiny_model, tiny_tokenizer
from headwater.models.vocabulary import usable_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD_CANDIDATES = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
"""Tokens that serve as padding in known vocabularies, none of which ends an answer."""


def materialise(
    source: str,
    out_dir: Path,
    *,
    layers: int | Sequence[int] | None = None,
    parent_dir: Path | None = None,
    seed: int = 0,
) -> None:
    """Write the model that `source` names to `out_dir` as a Hugging Face folder.

    source: "hf:ID-or-path", "gguf:path", "smollm2-135m", "tiny:NAME" or "prune:PARENTNAME".
    layers: for prune, how many layers of the parent to keep, or which.
    parent_dir: for prune, the folder of the parent. seed: draws the weights of tiny models.
    Weights keep the dtype of the source; GGUF and tiny ones are float32.
    Raises InputError where something the source needs is missing or does not fit.
    """
    described = describe_source(source)
    require_available(source)
    if described.kind is not SourceKind.PRUNE and layers is not None:
        raise InputError(
            f"layers: {layers} with source {source!r}: only prune:MODELNAME takes layers; "
            "remove the key"
        )
    if described.kind is SourceKind.PRUNE:
        model, tokenizer = _pruned(source, layers, parent_dir)
    else:
        model, tokenizer = _loaded(described, seed)
    require_full_attention(model, source)
    require_plain_head(model, source)
    settle_special_tokens(model, tokenizer, source)
    save_model(model, tokenizer, out_dir)


def _loaded(described: Source, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    match described.kind:
        case SourceKind.TINY:
            return tiny_model(described.target, seed), tiny_tokenizer()
        case SourceKind.SMOLLM2:
            return load_gguf(smollm2_path())
        case SourceKind.GGUF:
            return load_gguf(Path(described.target).expanduser())
        case _:
            return _from_hub(described.target)


def _from_hub(target: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(target).expanduser()
    name = path if path.is_dir() else target
    if path.is_dir():
        require_safe_folder(path)  # and says what is wrong with it
    try:
        with without_progress_bars(), refusing_own_code(f"hf:{target}"):
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=False, local_files_only=path.is_dir()
            )
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype="auto",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=path.is_dir(),
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"hf:{target} does not load ({error}): expected a causal language model that "
            "transformers reads, on the hub or in a folder; check the name and the network"
        ) from error
    require_all_weights(f"hf:{target}", info)
    return model, tokenizer


def _pruned(
    source: str,
    layers: int | Sequence[int] | None,
    parent_dir: Path | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if layers is None:
        raise InputError(
            f"source {source!r} without layers: expected how many layers to keep, or which; "
            "add layers: 12 or layers: [0, 2, 4]"
        )
    if parent_dir is None:
        raise InputError(
            f"source {source!r} without its parent's folder: expected parent_dir; materialise the "
            "parent first"
        )
    parent = load_model(parent_dir, dtype=stored_dtype(parent_dir))
    tokenizer = load_tokenizer(parent_dir)
    return prune_layers(parent, layers), tokenizer


def settle_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    """Make tokenizer, config and generation config agree on how answers end and rows are padded.

    The end token is the tokenizer's, beside any further ones of the generation config. The
    padding token is the tokenizer's unless that is missing or the end token itself (so
    that a padded end could be taken for an answer's): then one of `PAD_CANDIDATES` or the
    unknown token; a vocabulary without any pads with the end token.
    Changes `model` and `tokenizer`, which the caller has just loaded.
    Raises InputError for a tokenizer without end token, or with more tokens than the
    model's embedding has rows.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {source} has no end token: expected one that ends every answer; "
            "set eos_token in tokenizer_config.json"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if usable_vocabulary(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of {source} has ids up to {usable_vocabulary(tokenizer) - 1} but "
            f"its embedding has {rows} rows: expected a row for every id; use the model's own "
            "tokenizer"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        known = tokenizer.get_vocab().keys() - {tokenizer.eos_token}
        usable = [token for token in (*PAD_CANDIDATES, tokenizer.unk_token) if token in known]
        tokenizer.pad_token = (usable or [tokenizer.eos_token])[0]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
