"""GGUF files we write: read back by transformers they are the model that was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headwater.errors import InputError
from headwater.models.gguf import load_gguf, rope_factors, write_gguf
from headwater.models.gguf_tokens import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_vocabulary,
)
from headwater.models.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

pytest.importorskip("gguf", reason="needs `pip install gguf accelerate`")

TEXT = "Tom's 12 apples, and café au lait:\n\n he doesn't eat 3.5 of them\tat 10:30. " * 4
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def byte_level(splitter: PreTokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on TEXT, with marks, a word matched whole, and chat."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def splits(pattern: str) -> PreTokenizer:
    byte_step = ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([Split(Regex(pattern), "isolated"), byte_step])


def gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def drawn(model_class: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: one left out would show
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model.eval()


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama tied, wide heads": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "head_dim": 32},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_theta": 1e6}}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_read_back_with_the_same_logits(tmp_path: Path, family: str) -> None:
    model_class, config_class, values = FAMILIES[family]
    tokenizer = byte_level(gpt2())
    rows = len(tokenizer) + 5  # padded, as published embeddings are
    model = drawn(model_class, config_class(vocab_size=rows, **SIZES, **values))
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, dtype="float32", name="a model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    ids = tokenizer(TEXT).input_ids
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert read.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_embedded_model_reads_back_whole(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("teacher", seed=3), tiny_tokenizer()
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, dtype="float32", name="tiny")
    read, read_tokenizer = load_gguf(path)
    text = "<|im_start|>user\n7+5=?*3=?<|im_end|>\n<|im_start|>assistant\n\\boxed{12} so, users"
    ids = tokenizer(text).input_ids
    assert read_tokenizer(text).input_ids == ids
    assert read_tokenizer.decode(ids) == text
    assert read_tokenizer.chat_template == tokenizer.chat_template
    assert read_tokenizer.eos_token == "<|im_end|>"
    assert read.config.head_dim == 32
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bits", "error"), [("bfloat16", 16, 0.02), ("float16", 16, 2e-3), ("q8_0", 8.5, 0.04)]
)
def test_number_formats(tmp_path: Path, dtype: str, bits: float, error: float) -> None:
    model = tiny_model("teacher", seed=3)
    path = tmp_path / "model.gguf"
    write_gguf(model, tiny_tokenizer(), path, dtype=dtype, name="tiny")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert path.stat().st_size == pytest.approx(matrices * bits / 8, abs=15_000)
    read = load_gguf(path)[0].state_dict()
    for name, weight in model.state_dict().items():
        found = read[name]
        exact = weight.to(getattr(torch, dtype)).float() if dtype != "q8_0" else weight
        if weight.dim() == 1:  # vectors stay float32
            assert torch.equal(found, weight)
        elif dtype != "q8_0":
            assert torch.equal(found, exact)
        assert (found - weight).abs().max() <= error * weight.abs().max()


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (gpt2(), "gpt-2"),
        (pre_tokenizers.Sequence([Digits(individual_digits=True), gpt2()]), "smollm"),
        (splits(WORDS + r"\p{N}" + REST), "qwen2"),
        (splits(WORDS + r"\p{N}{1,3}" + REST), "llama-bpe"),
    ],
)
def test_splits_are_named_and_read_back(tmp_path: Path, splitter: PreTokenizer, name: str) -> None:
    tokenizer = byte_level(splitter)
    vocabulary = gguf_vocabulary(tokenizer, len(tokenizer) + 1)
    assert vocabulary.split == name
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<|im_end|>"] == CONTROL
    assert kinds["<think>"] == USER_DEFINED
    assert kinds["\u0120apples"] == NORMAL
    assert kinds[f"[PAD{len(tokenizer)}]"] == UNUSED
    model = drawn(Qwen2ForCausalLM, Qwen2Config(vocab_size=len(tokenizer), **SIZES))
    write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="float32", name="x")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = f"<|im_start|>{TEXT}<think>1234567 x<|im_end|>"
    assert read(text).input_ids == tokenizer(text).input_ids


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    odd = byte_level(splits(r"\p{N}{1,2}|\s+"))
    with pytest.raises(InputError, match=r"splits text by .* no name .* convert_hf_to_gguf"):
        gguf_vocabulary(odd, 400)
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match=r"kind WordPiece .* expected byte-level BPE"):
        gguf_vocabulary(pieces, 400)


def test_weights_that_readers_would_leave_out_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(gpt2())
    config = LlamaConfig(vocab_size=len(tokenizer), attention_bias=True, **SIZES)
    with pytest.raises(InputError, match=r"q_proj.bias has no place"):
        write_gguf(
            LlamaForCausalLM(config), tokenizer, tmp_path / "x.gguf", dtype="float32", name="x"
        )


def test_llama3_positions_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=128, max_position_embeddings=131_072, rope_parameters=rope)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config.rope_parameters, 128)
    assert factors is not None and factors[0] == 1.0 and factors[-1] == 8.0
    plain = 500_000.0 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / torch.from_numpy(factors), wanted, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="scaled by 'yarn'"):
        rope_factors({"rope_type": "yarn", "rope_theta": 1e4}, 64)
