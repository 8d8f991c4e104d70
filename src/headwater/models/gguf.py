"""GGUF files: read as ordinary models, and written for llama.cpp and what is built on it.

Read: dequantised to float32, the quantisation marker gone. Written: Llama, Mistral, Qwen2 and
Qwen3 architectures, in float32, float16, bfloat16 or 8-bit blocks (Q8_0).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.errors import InputError
from headwater.models.gguf_tokens import gguf_vocabulary
from headwater.models.loading import require_all_weights, without_progress_bars
from headwater.models.saving import rebuild
from headwater.models.source_names import (
    GGUF_INSTALL,
    require_gguf_file,
    require_gguf_packages,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""config.json's model_type -> the format's name for the architecture."""

FORMATS = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""Number format -> the format's names for a tensor and a file of it. Vectors stay float32."""

_PROBE = "Tom has 12 apples,\n\nand he doesn't eat 3.5 of them:  x_1+2=?\tcafé \\boxed{7}"


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, eval mode) and tokenizer of the GGUF file `path`.

    Raises InputError where the file, or a package that reads it, is missing, and where
    transformers does not know the file's architecture.
    """
    require_gguf_file(path)
    require_gguf_packages(GGUF_INSTALL)
    try:
        with without_progress_bars():
            tokenizer = _load_tokenizer(path)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.float32,
                output_loading_info=True,
                **_of_file(path),
                **_head_width(path),
            )
    except (ValueError, KeyError, NotImplementedError, struct.error) as error:
        raise InputError(
            f"{path} does not load as a GGUF model ({error}): expected an architecture and a "
            "quantisation that transformers reads; give the original model as hf:ID"
        ) from error
    require_all_weights(str(path), info)
    return rebuild(model), tokenizer


def require_writable(model_type: str, dtype: str) -> None:
    """Raise InputError unless models of this type can be written, in this number format."""
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model_type {model_type!r} cannot be written as GGUF here: expected one of "
            f"{', '.join(ARCHITECTURES)}; export --format hf and convert the folder with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if dtype not in FORMATS:
        raise InputError(
            f"dtype {dtype!r} is no number format of a GGUF here: expected one of "
            f"{', '.join(FORMATS)}; choose one with --dtype"
        )
    require_gguf_packages(GGUF_INSTALL)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    dtype: str,
    name: str,
) -> None:
    """Write a model to the GGUF file `path`: weights, sizes, tokenizer, chat template, end tokens.

    dtype: one of FORMATS. name: what the file calls the model. The tokenizer is read back and
    must give the same ids. Raises InputError for what `require_writable` refuses, for a tokenizer
    or scaled positions that the format has no place for, and for one that reads back differently.
    """
    from gguf import GGUFValueType, LlamaFileType

    require_writable(model.config.model_type, dtype)
    vocabulary = gguf_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    writer = _writer(path, ARCHITECTURES[model.config.model_type])
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[FORMATS[dtype][1]])
    _add_sizes(writer, model.config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_key_value("tokenizer.ggml.merges", vocabulary.merges, GGUFValueType.ARRAY)
    _add_special_tokens(writer, model, tokenizer)
    writer.add_chat_template(tokenizer.chat_template)
    for tensor_name, values in _tensors(model):
        _add_tensor(writer, tensor_name, values, FORMATS[dtype][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _require_same_tokens(tokenizer, path)


def rope_factors(rope: Mapping[str, Any], width: int) -> np.ndarray | None:
    """By how much each of a head's width/2 frequencies is divided; None for plain positions.

    rope: the config's `rope_parameters`. Known is Llama 3.1's way: long waves are stretched by
    `factor`, short ones kept, those between blended. Raises InputError for any other.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"positions scaled by {kind!r} cannot be written as GGUF here: expected plain ones, or "
            "Llama 3's; export --format hf and convert the folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns * rope["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1 keeps a frequency, 0 stretches it
    found: np.ndarray = (1 / ((1 - kept) / factor + kept)).astype(np.float32)
    return found


def _writer(path: Path, architecture: str) -> GGUFWriter:
    """The library's writer, which also writes an empty list: readers want merges, be it none."""
    from gguf import GGUFValueType, GGUFWriter

    class Writer(GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, *args: Any, **kwargs: Any) -> bytes:
            if vtype == GGUFValueType.ARRAY and len(val) == 0:
                return struct.pack("<IIQ", vtype, GGUFValueType.STRING, 0)
            packed: bytes = super()._pack_val(val, vtype, *args, **kwargs)
            return packed

    return Writer(path, architecture)


def _add_sizes(writer: GGUFWriter, config: PretrainedConfig) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    factors = rope_factors(config.rope_parameters, width)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)


def _add_special_tokens(
    writer: GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_eos_token_id(end)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if begin is not None:
        writer.add_bos_token_id(begin)
    writer.add_add_bos_token(begin is not None and tokenizer("1").input_ids[:1] == [begin])
    ends = model.generation_config.eos_token_id if model.generation_config else None
    others = [one for one in ends if one != end] if isinstance(ends, list) else []
    if others:
        writer.add_eot_token_id(others[0])


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under the format's name; a head that is the embedding is left out."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    name = ARCHITECTURES[config.model_type]
    kind = next(kind for kind, text in MODEL_ARCH_NAMES.items() if text == name)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = full.rpartition(".")
        found = names.get_name(stem)
        if found is None or (name == "llama" and suffix == "bias"):  # readers leave those out
            raise InputError(
                f"weight {full} has no place in a GGUF of architecture {name}: expected "
                f"the weights of a plain {config.model_type} model alone; export --format hf"
            )
        projection = stem.rpartition(".")[2]
        if name == "llama" and projection in heads:
            tensor = _interleaved(tensor, heads[projection])
        yield f"{found}.{suffix}", tensor


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp rotates them: pairs side by side.

    transformers rotates row i of a head with row i + width/2, llama.cpp 2i with 2i + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, stored: str) -> None:
    """Add one weight; vectors, and rows that are no whole blocks, keep more than was asked for."""
    from gguf import GGMLQuantizationType, quantize
    from gguf.constants import GGML_QUANT_SIZES

    kind = GGMLQuantizationType[stored if tensor.dim() > 1 else "F32"]
    if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def _require_same_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise InputError unless the tokenizer reads back from the file as it was."""
    message = [{"role": "user", "content": "1+2=?"}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    with without_progress_bars():
        read = _load_tokenizer(path)
    embedded = tokenizer.backend_tokenizer.model.__class__.__name__ == "WordLevel"
    for text in (chat,) if embedded else (chat, _PROBE):
        wanted, found = (one.encode(text, add_special_tokens=False) for one in (tokenizer, read))
        if wanted != found:
            raise InputError(
                f"the tokenizer reads back from GGUF differently: {text!r} is {found[:12]} instead "
                f"of {wanted[:12]}; export --format hf and convert the folder with llama.cpp's "
                "convert_hf_to_gguf.py"
            )


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path.parent, **_of_file(path))


def _head_width(path: Path) -> dict[str, int]:
    """The width of a head where the file gives it and transformers would take 128 instead."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("qwen3.attention.key_length")
    return {} if field is None else {"head_dim": int(field.contents())}


def _of_file(path: Path) -> dict[str, Any]:
    """Only this file: nothing is fetched, and no code that lies beside it is run."""
    return {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
