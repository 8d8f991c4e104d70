"""A pruned model is its kept layers, one after the other, and its config says so."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from headwater.errors import InputError
from headwater.models.loading import load_model
from headwater.models.prune import layer_list, prune_layers
from headwater.models.saving import save_model
from headwater.models.source_names import kept_layers
from headwater.models.tiny import tiny_config, tiny_model, tiny_tokenizer

IDS_1T = torch.tensor([[1, 4, 6, 9, 18, 9, 22, 30, 2, 6, 1, 5, 6]])


def composed_logits(model: PreTrainedModel, layers: list[int]) -> Tensor:
    """Logits [1, T, V] of the embedding, the named layers by hand, final norm and head."""
    body = model.model
    hidden = body.embed_tokens(IDS_1T)
    rope = body.rotary_emb(hidden, torch.arange(IDS_1T.shape[1])[None])
    for layer in layers:
        hidden = body.layers[layer](hidden, attention_mask=None, position_embeddings=rope)
    return model.lm_head(body.norm(hidden))


@pytest.mark.parametrize(
    ("choice", "layers"), [(2, [0, 3]), (3, [0, 2, 3]), ([1, 2], [1, 2]), ([2], [2]), (4, range(4))]
)
@torch.no_grad()
def test_forward_is_the_kept_layers_composed(choice: int | list[int], layers: list[int]) -> None:
    model = tiny_model("tiny:large", seed=0)
    pruned = prune_layers(model, choice)
    assert torch.equal(pruned(IDS_1T).logits, composed_logits(model, list(layers)))
    assert pruned.config.num_hidden_layers == len(layers)
    assert len(pruned.config.layer_types) == len(layers)


@torch.no_grad()
def test_generation_with_a_cache_equals_the_plain_forward() -> None:
    pruned = prune_layers(tiny_model("tiny:large", seed=0), [1, 3])
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    out = pruned.generate(IDS_1T, max_new_tokens=8, do_sample=False, eos_token_id=None)
    new = out[:, IDS_1T.shape[1] :]
    logits = pruned(out[:, :-1], use_cache=False).logits[:, IDS_1T.shape[1] - 1 :]
    assert torch.equal(new, logits.argmax(-1))


def test_original_is_left_alone_and_shares_nothing() -> None:
    model = tiny_model("tiny:large", seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_layers(model, 2)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    assert model.config.num_hidden_layers == 4
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_tied_embedding_stays_tied_and_the_folder_loads(tmp_path: Path) -> None:
    pruned = prune_layers(tiny_model("tiny:large", seed=0), 2)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    save_model(pruned, tiny_tokenizer(), tmp_path)
    read = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(read(IDS_1T).logits, pruned(IDS_1T).logits)


@torch.no_grad()
def test_attention_windows_follow_their_layers(tmp_path: Path) -> None:
    values = tiny_config("tiny:large").to_dict()
    values |= {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": [
            "full_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**values)).eval()
    pruned = prune_layers(model, [0, 3])
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.sliding_window for layer in pruned.model.layers] == [None, 4]
    assert prune_layers(model, [1, 2]).config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.layer_types == values["layer_types"]
    save_model(pruned, tiny_tokenizer(), tmp_path)
    read = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()  # load_model refuses windows
    assert torch.equal(read(IDS_1T).logits, pruned(IDS_1T).logits)


def test_interleaved_windows_of_gemma_follow_their_layers() -> None:
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
    )
    pruned = prune_layers(Gemma3ForCausalLM(config).eval(), [4, 5, 6])
    assert config.layer_types[4:] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert pruned.config.layer_types == config.layer_types[4:]


def moe_model(**changes: object) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        **changes,
    )
    return Qwen3MoeForCausalLM(config).eval()


def test_config_lists_of_layer_numbers_are_renumbered() -> None:
    pruned = prune_layers(moe_model(mlp_only_layers=[0, 3]), [0, 1, 3])
    assert pruned.config.mlp_only_layers == [0, 2]


def test_pattern_by_layer_number_that_would_break_is_refused() -> None:
    with pytest.raises(InputError, match=r"mlp\.(experts|gate)"):
        prune_layers(moe_model(decoder_sparse_step=2), [0, 2, 3])


@given(st.integers(2, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))))
def test_even_choice_keeps_both_ends_and_gaps_differ_by_at_most_one(sizes: tuple[int, int]) -> None:
    total, count = sizes
    kept = kept_layers(total, count)
    assert (kept[0], kept[-1], len(kept)) == (0, total - 1, count)
    gaps = {high - low for low, high in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


@pytest.mark.parametrize("choice", [0, 1, 5, -1, [], [0, 4], [3, 0], [1, 1], [-1, 2]])
def test_choices_the_model_does_not_allow_are_refused(choice: int | list[int]) -> None:
    with pytest.raises(InputError, match="of a model with 4: expected"):
        kept_layers(4, choice)


def test_layer_list_is_found_by_its_length() -> None:
    name, layers = layer_list(tiny_model("tiny:large", seed=0))
    assert (name, len(layers)) == ("model.layers", 4)
