"""What is saved loads again bit by bit, in transformers, and broken folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from headwater.errors import InputError
from headwater.models.loading import load_model, load_tokenizer
from headwater.models.saving import rebuild, save_model, save_weights
from headwater.models.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "student"
    save_model(tiny_model("tiny:student", seed=3), tiny_tokenizer(), path)
    return path


def test_every_weight_comes_back_bit_by_bit(folder: Path) -> None:
    written = tiny_model("tiny:student", seed=3).state_dict()
    read = load_model(folder, dtype=torch.float32).state_dict()
    assert list(read) == list(written)
    assert all(torch.equal(read[name], written[name]) for name in written)


def test_tied_embedding_is_written_once_and_tied_when_loaded(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


def test_weights_alone_are_written_once_over_what_was_there(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "model.safetensors"
    for seed in (1, 2):
        state = tiny_model("tiny:student", seed=seed).state_dict()
        save_weights(state, path)
    found = load_file(path)
    assert found.keys() == load_file(folder / "model.safetensors").keys()  # tied weights once
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_untied_heads_are_kept_apart(tmp_path: Path) -> None:
    config = tiny_config("tiny:student")
    config.tie_word_embeddings = False
    model = Qwen3ForCausalLM(config)
    save_model(model, tiny_tokenizer(), tmp_path)
    read = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    assert torch.equal(read.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(read.lm_head.weight, read.model.embed_tokens.weight)


def test_dtype_of_the_folder_is_the_one_asked_for(tmp_path: Path) -> None:
    model = tiny_model("tiny:student", seed=0)
    save_model(model, tiny_tokenizer(), tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32, "the model saved from is left as it was"
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored[name], model.state_dict()[name].to(torch.bfloat16))


def test_plain_transformers_loads_the_folder_and_answers_through_the_template(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1=?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert 1 <= len(answer) <= 4
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_folder_names_a_tokenizer_class_that_older_servers_know(folder: Path) -> None:
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_pickled_weights_are_written(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_rebuilt_model_computes_the_same_logits(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 4, 6, 9, 18, 9, 2]])
    with torch.no_grad():
        assert torch.equal(rebuild(model)(ids).logits, model(ids).logits)


def test_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        save_model(tiny_model("tiny:student", seed=0), tokenizer, tmp_path / "model")


def test_missing_folder_and_missing_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere", dtype=torch.float32)
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_tokenizer(tmp_path)


def test_missing_weight_is_refused_instead_of_drawn_at_random(tmp_path: Path) -> None:
    save_model(tiny_model("tiny:student", seed=0), tiny_tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, dtype=torch.float32)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model("tiny:student", seed=0).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
