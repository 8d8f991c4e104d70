"""How large a model is, from its config.json alone: planning counts without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwater.config.recipe import ModelSpec
from headwater.errors import InputError
from headwater.models.config_file import decoder_config, read_config
from headwater.models.known_sizes import known_config
from headwater.models.source_names import SourceKind, describe_source, kept_layers
from headwater.models.tiny_sizes import tiny_config_values

SMOLLM2_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}

QKV_BIAS = frozenset({"qwen2", "qwen2_moe"})
"""Families whose query, key and value projections have a bias that no config key names."""

QK_NORM = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text"})
"""Families with a norm on queries and on keys, one weight per head dimension."""

FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
"""Families with norms before and after attention and MLP."""

TIED_UNLESS_SAID = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
"""Families whose config leaves tie_word_embeddings out when it is true."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What planning needs to know of a model's size.

    parameters: all, a tied embedding counted once. matmul_parameters: those that every
    token is multiplied with (layers and head, not the input embedding; of experts the
    active ones). kv_values_per_token: numbers the KV cache keeps of one token.
    attention_width: of all query heads together. layer_parameters: of the largest layer;
    root_parameters: of embedding, last norm and head. intermediate: width of the MLP that one
    token goes through; head_norms: whether queries and keys have norms of their own.
    """

    parameters: int
    matmul_parameters: int
    layers: int
    hidden: int
    vocabulary: int
    kv_values_per_token: int
    attention_width: int
    layer_parameters: int
    root_parameters: int
    intermediate: int
    head_norms: bool

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's query, key and value projections."""
        return self.hidden * (self.attention_width + self.kv_values_per_token // self.layers)


def together(sizes: Sequence[ModelSize | None]) -> ModelSize | None:
    """Models of which each token is read by one, at most by the largest, and all are held.

    None where one is not known.
    """
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    largest = max(known, key=lambda size: size.matmul_parameters)
    return replace(largest, parameters=sum(size.parameters for size in known))


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of parameters of the decoder that a config.json describes, tied weights once.

    Exact for the Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and Gemma families, an estimate
    for others of their build. Raises InputError where a width is missing.
    """
    return model_size(config).parameters


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """Size of the decoder that a config.json describes; see `parameter_count` for how exact.

    Raises InputError where a width is missing.
    """
    config = decoder_config(config)
    vocabulary, hidden = _number(config, "vocab_size"), _number(config, "hidden_size")
    layers = _number(config, "num_hidden_layers")
    heads = _number(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    family = config.get("model_type", "")
    per_layer = _attention(config, heads, kv_heads, head_dim)
    per_layer += (4 if family in FOUR_NORMS else 2) * hidden
    mlps = [_mlp(config, layer) for layer in range(layers)]
    body = layers * per_layer + hidden
    tied = config.get("tie_word_embeddings", family in TIED_UNLESS_SAID)
    embedding = vocabulary * hidden
    root = hidden + embedding * (1 if tied else 2)
    return ModelSize(
        parameters=layers * per_layer + sum(total for total, _ in mlps) + root,
        matmul_parameters=body + sum(active for _, active in mlps) + embedding,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        kv_values_per_token=2 * layers * kv_heads * head_dim,
        attention_width=heads * head_dim,
        layer_parameters=per_layer + max(total for total, _ in mlps),
        root_parameters=root,
        intermediate=max(active for _, active in mlps) // (3 * hidden),
        head_norms=family in QK_NORM,
    )


def _attention(config: Mapping[str, Any], heads: int, kv_heads: int, head_dim: int) -> int:
    hidden, family = _number(config, "hidden_size"), config.get("model_type", "")
    queries, keys = heads * head_dim, kv_heads * head_dim
    count = 2 * hidden * queries + 2 * hidden * keys
    if family in QKV_BIAS:
        count += queries + 2 * keys
    elif config.get("attention_bias"):
        count += queries + 2 * keys + hidden
    return count + (2 * head_dim if family in QK_NORM else 0)


def _mlp(config: Mapping[str, Any], layer: int) -> tuple[int, int]:
    """Parameters of a layer's MLP: all of them, and those active for one token."""
    hidden = _number(config, "hidden_size")
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    step = config.get("decoder_sparse_step", 1)
    if not experts or layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % step:
        width = _number(config, "intermediate_size")
        count = 3 * hidden * width + (2 * width + hidden if config.get("mlp_bias") else 0)
        return count, count
    expert = (
        3 * hidden * (config.get("moe_intermediate_size") or _number(config, "intermediate_size"))
    )
    router = hidden * experts
    return router + experts * expert, router + config.get("num_experts_per_tok", 1) * expert


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise InputError(
            f"config.json has {name}={value!r}: expected a whole number to estimate the model's "
            "size from; give a decoder model in the format of transformers"
        )
    return value


def source_config(
    source: str,
    *,
    layers: int | Sequence[int] | None = None,
    parent: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The config.json values of `source` as far as its size needs them; None if not known yet.

    Not known are GGUF files and hub models that are neither in a local folder nor in
    `known_sizes`: they are read when materialised. layers, parent: for prune, the choice and
    the parent's values. Raises InputError for a source or a choice of layers that does not exist.
    """
    described = describe_source(source)
    if described.kind is SourceKind.TINY:
        return tiny_config_values(described.target)
    if described.kind is SourceKind.SMOLLM2:
        return dict(SMOLLM2_CONFIG)
    if described.kind is SourceKind.HF:
        folder = Path(described.target).expanduser()
        return read_config(folder) if folder.is_dir() else known_config(described.target)
    if described.kind is SourceKind.PRUNE and parent is not None and layers is not None:
        decoder = decoder_config(parent)
        kept = kept_layers(_number(decoder, "num_hidden_layers"), layers)
        return {**decoder, "num_hidden_layers": len(kept)}
    return None


def model_configs(
    models: Mapping[str, ModelSpec], fetched: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Mapping[str, Any] | None]:
    """`source_config` of every model of a recipe, parents before what is pruned from them.

    fetched: source -> its config, of sources that are there by now. Raises InputError with the
    recipe's key for layers that the parent does not have.
    """
    fetched = fetched or {}
    found: dict[str, Mapping[str, Any] | None] = {}

    def config_of(name: str) -> Mapping[str, Any] | None:
        if name not in found:
            spec = models[name]
            parent = describe_source(spec.source).parent
            above = None if parent is None else config_of(parent)
            try:
                found[name] = fetched.get(spec.source) or source_config(
                    spec.source, layers=spec.layers, parent=above
                )
            except InputError as error:
                raise InputError(f"models.{name}: {error}") from error
        return found[name]

    return {name: config_of(name) for name in models}


def hidden_size(model_dir: Path) -> int:
    """Hidden size of the model in a folder, from its config.json."""
    return _number(decoder_config(read_config(model_dir)), "hidden_size")
