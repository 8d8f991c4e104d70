"""A student cut from a larger model by keeping chosen layers; tokenizer and widths stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from headwater.errors import InputError
from headwater.models.saving import build_from_state
from headwater.models.source_names import kept_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ONE_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
)
"""Config lists with one entry per layer."""

LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices")
"""Config lists that name layers by number."""


def prune_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A new model with the chosen layers of `model`, in their order, and everything else of it.

    layers: an int keeps that many, spread evenly, the first and the last always; a
    sequence keeps those numbers. Weights are copied. The config's layer count and
    per-layer lists follow, and layers are numbered anew. Returns it in eval mode.
    Raises InputError for a choice that the model does not allow, and for a model whose
    kept layers would behave otherwise at their new place (patterns by layer number).
    """
    prefix, blocks = layer_list(model)
    kept = kept_layers(len(blocks), layers)
    config = pruned_config(model.config, kept)
    state = pruned_state(model.state_dict(), prefix, kept)
    try:
        pruned = build_from_state(type(model), config, state, model.generation_config)
    except InputError as error:
        raise InputError(
            f"layers {list(kept)} of {type(model).__name__} do not fit their new places: {error}; "
            "choose layers that keep the model's pattern of layers"
        ) from error
    require_same_layers(model, pruned, kept)
    return pruned


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list that holds the model's layers, such as "model.layers".

    Raises InputError where there is no such list.
    """
    total = model.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of {total} layers to choose from: expected a "
            "decoder with one module per layer; prune another model"
        )
    return min(lists, key=lambda entry: entry[0].count("."))


def pruned_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of `config` for the layers `kept` alone."""
    result = copy.deepcopy(config)
    result.num_hidden_layers = len(kept)
    values = config.to_dict()
    for name in ONE_PER_LAYER:
        if values.get(name) is not None:
            setattr(result, name, [values[name][layer] for layer in kept])
    for name in LAYER_NUMBERS:
        if values.get(name) is not None:
            setattr(result, name, [kept.index(i) for i in values[name] if i in kept])
    return result


def pruned_state(state: dict[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Copies of the tensors of `state` that stay, those of layers renamed to their new number."""
    new_number = {str(old): new for new, old in enumerate(kept)}
    result = {}
    for name, tensor in state.items():
        if not name.startswith(f"{prefix}."):
            result[name] = tensor.detach().clone()
            continue
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if number in new_number:
            result[f"{prefix}.{new_number[number]}.{rest}"] = tensor.detach().clone()
    return result


def require_same_layers(
    model: PreTrainedModel, pruned: PreTrainedModel, kept: Sequence[int]
) -> None:
    """Raise InputError where a kept layer differs from the original in more than its number."""
    _, before = layer_list(model)
    _, after = layer_list(pruned)
    for new, old in enumerate(kept):
        was, now = layer_traits(before[old]), layer_traits(after[new])
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                raise InputError(
                    f"layer {old} of {type(model).__name__} has {name}={was.get(name)!r}, but as "
                    f"layer {new} of the pruned model {now.get(name)!r}: expected a layer to stay "
                    "what it was; choose layers that keep the model's pattern"
                )


def layer_traits(layer: nn.Module) -> dict[str, object]:
    """Plain settings of a layer and its parts (window, attention type, ...) but its number."""
    return {
        f"{part}.{name}".lstrip("."): value
        for part, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("layer_idx", "training")
    }
