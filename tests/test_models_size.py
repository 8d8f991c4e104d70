"""Sizes from config.json equal the sizes of the models, and need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headwater.config.recipe import ModelSpec
from headwater.errors import InputError
from headwater.models.size import (
    hidden_size,
    model_configs,
    model_size,
    parameter_count,
    source_config,
)
from headwater.models.tiny import tiny_model
from headwater.models.tiny_sizes import TINY_SIZES, tiny_config_values

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen3_moe", {"tie_word_embeddings": False, "mlp_only_layers": [1], **EXPERTS}),
        ("qwen3_moe", {"tie_word_embeddings": False, "decoder_sparse_step": 2, **EXPERTS}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_count_equals_the_parameters_of_the_model(family: str, changes: dict) -> None:
    shape = dict(SHAPE)
    if family == "qwen2":  # its config has no head_dim of its own
        del shape["head_dim"]
    config = AutoConfig.for_model(family, pad_token_id=0, **shape, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = parameter_count({"model_type": family, **shape, **changes})
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY_SIZES)
def test_embedded_models_are_as_large_as_planned(name: str) -> None:
    planned = parameter_count(tiny_config_values(name))
    assert planned == sum(p.numel() for p in tiny_model(name, seed=0).parameters())


def test_smollm2_and_a_student_pruned_from_it() -> None:
    parent = source_config("smollm2-135m")
    assert parameter_count(parent) == 134_515_008
    student = source_config("prune:teacher", layers=12, parent=parent)
    size = model_size(student)
    assert size.layers == 12
    assert size.parameters == 49152 * 576 + 12 * 3_540_096 + 576
    assert size.kv_values_per_token == 2 * 12 * 3 * 64
    assert size.attention_width == 9 * 64
    assert size.matmul_parameters == size.parameters, "the tied head multiplies every token"


@pytest.mark.parametrize(
    ("hub_id", "parameters"),
    [  # as the hub counts the tensors, a tied head once
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.3-70B", 70_553_706_496),
    ],
)
@pytest.mark.parametrize("variant", ["", "-Base", "-Instruct"])
def test_published_architectures_have_their_published_sizes(
    hub_id: str, parameters: int, variant: str
) -> None:
    config = source_config(f"hf:{hub_id}{variant}")
    assert config is not None
    assert parameter_count(config) == parameters


def test_a_local_folder_goes_before_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-8B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 7}')
    assert source_config("hf:Qwen/Qwen3-8B") == {"hidden_size": 7}


def test_active_experts_alone_multiply() -> None:
    config = {"model_type": "qwen3_moe", "tie_word_embeddings": True, **SHAPE, **EXPERTS}
    size = model_size(config)
    assert size.parameters - size.matmul_parameters == 3 * 2 * 3 * 48 * 24


def test_sources_read_only_when_materialised_are_unknown() -> None:
    assert source_config("hf:some/model") is None
    assert source_config("gguf:some.gguf") is None
    assert source_config("prune:teacher", layers=4, parent=None) is None


def test_layers_that_no_parent_has_are_named_by_their_key() -> None:
    models = {
        "small": ModelSpec(source="prune:middle", layers=3),
        "middle": ModelSpec(source="prune:whole", layers=4),
        "whole": ModelSpec(source="hf:some/model"),
    }
    assert model_configs(models) == {"small": None, "middle": None, "whole": None}
    whole = {"text_config": {"num_hidden_layers": 6, "vocab_size": 9}}
    found = model_configs(models, {"hf:some/model": whole})
    assert found["small"] == {"num_hidden_layers": 3, "vocab_size": 9}
    models["small"] = ModelSpec(source="prune:middle", layers=(0, 4))
    with pytest.raises(InputError, match=r"models\.small: layers: \[0, 4\] of a model with 4"):
        model_configs(models, {"hf:some/model": whole})


@pytest.mark.parametrize(
    ("text", "says"), [("{", "config.json is not JSON"), ("[1]", "holds one list")]
)
def test_a_malformed_config_of_a_local_folder_is_named(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"{says}.*copy it from the model again"):
        source_config(f"hf:{tmp_path}")
    with pytest.raises(InputError, match=says):
        hidden_size(tmp_path)


def test_config_without_a_width_is_refused() -> None:
    with pytest.raises(InputError, match="hidden_size=None"):
        parameter_count({"vocab_size": 10})


def test_planning_does_not_import_torch() -> None:
    code = (
        "import sys; import headwater.models.size, headwater.models.source_names; "
        "print(sorted({'torch', 'transformers', 'gguf'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
