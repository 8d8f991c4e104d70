"""Writing a model as a Hugging Face folder that transformers and vLLM load.

The model is rebuilt from its config and state dict, so that nothing of how it was made
(a GGUF's quantisation marker, a wrapper, a compute dtype) reaches the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from headwater.models.loading import (
    require_all_weights,
    require_chat_template,
    without_progress_bars,
)

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config, safetensors, generation config and tokenizer of a model to `out_dir`.

    dtype: of the floating-point weights in the folder; None keeps the model's own.
    Tied weights are written once. The model and the tokenizer are left as they were.
    Raises InputError for a tokenizer without a chat template.
    """
    require_chat_template(tokenizer, f"the tokenizer of {type(model).__name__}")
    out_dir.mkdir(parents=True, exist_ok=True)
    rebuilt = rebuild(model, dtype=dtype)
    # save_pretrained refuses defaults that generate() would ignore, such as a temperature
    # without do_sample, which hub models do have: the source's are written as they are.
    rebuilt.generation_config = GenerationConfig.from_model_config(rebuilt.config)
    with without_progress_bars():
        rebuilt.save_pretrained(out_dir)
    if model.generation_config is not None:
        model.generation_config.to_json_file(out_dir / "generation_config.json")
    save_tokenizer(tokenizer, out_dir)
    for weights in out_dir.glob("*.safetensors"):  # written as 0600, whatever the umask says
        weights.chmod((out_dir / "config.json").stat().st_mode)


def save_weights(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a model's state dict alone, as it is, to the safetensors file `path`, by one rename.

    For a server that has the model already and takes new weights; tied ones are written once,
    under the name that comes first. Nothing is flushed: the file is worth no more than a moment.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in once_each(state).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".writing")
    save_file(kept, written, metadata={"format": "pt"})
    written.replace(path)


def once_each(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, in the same memory and without gradients; tied ones once, under
    the name that comes first."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen.add(place)
            kept[name] = tensor.detach()
    return kept


def rebuild(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of the same class from a copy of `model`'s config and its state dict, in eval mode.

    dtype: of the floating-point weights; None keeps the model's own, and then the
    weights are shared with `model`, not copied.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or model.dtype
    state = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    return build_from_state(type(model), config, state, model.generation_config)


def build_from_state(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    state: dict[str, torch.Tensor],
    generation_config: GenerationConfig | None,
) -> PreTrainedModel:
    """A model in eval mode that holds the tensors of `state` (not copies), tied as config says.

    Raises InputError where `state` is not exactly what the config describes.
    """
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with without_progress_bars():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    require_all_weights(f"the state of {model_class.__name__}", info, allow_unexpected=False)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    """Write the tokenizer's files to `out_dir`, under the class name that every version knows.

    transformers 5 names its class TokenizersBackend; version 4, which older servers carry,
    knows the same files as PreTrainedTokenizerFast, and version 5 accepts that name too.
    """
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        values.pop(name, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
