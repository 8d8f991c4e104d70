"""The embedded models: an exact tokenizer, a chat template, sizes and weights by seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from headwater.models.tiny_sizes import TINY_SIZES, VOCABULARY

TOKENIZER = tiny_tokenizer()
ALPHABET = st.lists(st.sampled_from(VOCABULARY), max_size=40).map("".join)


@given(ALPHABET)
@settings(max_examples=200, deadline=None)
def test_decoding_gives_back_the_encoded_text(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= index < len(VOCABULARY) for index in ids)


@given(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_to_their_tokens_joined(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == "".join(VOCABULARY[index] for index in ids)


def test_vocabulary_has_no_gaps_and_no_doubles() -> None:
    assert TOKENIZER.get_vocab() == {token: index for index, token in enumerate(VOCABULARY)}
    assert len(TOKENIZER) == tiny_config("tiny:student").vocab_size == 63


def test_words_are_single_tokens() -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER("user: \\boxed{12}").input_ids)
    assert tokens == ["user", ":", " ", "\\boxed{", "1", "2", "}"]


def test_character_outside_the_alphabet_is_refused_not_hidden() -> None:
    with pytest.raises(Exception, match="UNK"):
        TOKENIZER("What?")


def test_chat_template_is_chatml_with_single_tokens_for_its_marks() -> None:
    messages = [{"role": "user", "content": "1+1=?"}]
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert len(ids) == 3 + 5 + 2 + 3
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("name", TINY_SIZES)
def test_sizes_are_those_of_the_table(name: str) -> None:
    size, config = TINY_SIZES[name], tiny_config(f"tiny:{name}")
    assert (config.hidden_size, config.num_hidden_layers) == (size.hidden, size.layers)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim == 32
    assert config.tie_word_embeddings


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = tiny_model("student", seed=0).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, other = tiny_model("tiny:student", 0).state_dict(), tiny_model("student", 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_unknown_size_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"'tiny:huge'.*tiny:student, tiny:small, tiny:teacher"):
        tiny_config("tiny:huge")
