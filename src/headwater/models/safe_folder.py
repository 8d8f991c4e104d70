"""What a model folder from anybody must not hold to be loaded; torch-free, so that planning asks.

A model is weights, settings and a tokenizer. Weights as pickles run code when they are read, an
`auto_map` names code to import, an adapter and an index name files elsewhere: none is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.models.config_file import decoder_config, read_config
from headwater.plain_json import read_json_file

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MOST_LAYERS = 10_000
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def require_safe_folder(folder: Path) -> None:
    """Raise InputError for a model folder that is not safe to load.

    Refused: weights that are pickles only, an index of weights that leads out of the folder, an
    adapter (its weights belong to a model that its settings name), kernels to be fetched, and a
    number of layers that no model has. Custom code (`auto_map`) is never imported, whatever the
    folder says: an architecture that transformers lacks is refused when it is loaded.
    """
    _require_safetensors(folder)
    _require_own_weights(folder)
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"model folder {folder} holds an adapter ({_ADAPTER}), which names a model elsewhere: "
            "expected a whole model; merge the adapter into its base and give that folder"
        )
    _require_plain_config(read_config(folder), folder)


def needs_own_code(error: BaseException) -> bool:
    """Whether transformers refused a model because it would have to run the model's own code."""
    return "trust_remote_code" in str(error)


def own_code_refused(name: str) -> InputError:
    """The error for such a model; `name` is its source."""
    return InputError(
        f"{name} comes with code of its own (auto_map), which headwater never runs: expected an "
        "architecture that transformers has, such as Llama, Qwen or SmolLM; choose such a model, "
        "or convert this one"
    )


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"model folder {folder} has its weights in {pickles[0]} and none in safetensors: a "
            "pickle can run any code when it is read, so it is not; download the safetensors "
            "version, or convert the weights where you trust them, with save_pretrained"
        )


def _require_own_weights(folder: Path) -> None:
    path = folder / _INDEX
    if not path.is_file():
        return
    try:
        index = read_json_file(path)
        names = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected {{weight_map: {{weight: file}}}}; copy it "
            "from the model again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{path} names {name!r} for weights: expected files of its own folder; download "
                "the model again from where you trust it"
            )


def _require_plain_config(config: Mapping[str, Any], folder: Path) -> None:
    for part in (config, decoder_config(config)):
        for key in _KERNEL_KEYS:
            value = part.get(key)
            if isinstance(value, dict) or (isinstance(value, str) and "/" in value):
                raise InputError(
                    f"{folder / 'config.json'} has {key}={value!r}: kernels named by a model are "
                    "code, and are not fetched; remove the key"
                )
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise InputError(
                f"{folder / 'config.json'} has num_hidden_layers={layers}: expected at most "
                f"{MOST_LAYERS:,}; download the model again"
            )
