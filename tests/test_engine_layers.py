"""Hand-written layers and packed decoding equal the library's, in every family and layout."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headwater.engine import attention
from headwater.engine.decoder import RecordedSteps, decoder_of
from headwater.engine.decoding import DecodeLayout
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.fused_layers import fuse_layers, parameters_of
from headwater.engine.packed_linear import PackedLinear
from headwater.engine.packing import PackedGroup, micro_batches, pack, pack_prompts
from headwater.errors import InputError
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.rollout import sampler as sampling
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
#: Grouped and plain queries, head norms, biases, an untied head, a head wider than hidden / heads.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
}


def _family(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(7)
    model = FAMILIES[name]().to(dtype)
    with torch.no_grad():  # weights at their start are too even to tell a norm or a bias missing
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def _ours(plain: PreTrainedModel, fused: bool = True) -> PreTrainedModel:
    model = copy.deepcopy(plain)
    model.set_attn_implementation("headwater")
    if fused:
        assert fuse_layers(model) == 2
    return model


def _groups(even: bool, width: int = 3) -> list[PackedGroup]:
    rng = random.Random(5)

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        length = longest if even else rng.randint(shortest, longest)
        return tuple(rng.randrange(VOCAB) for _ in range(length))

    return [
        PackedGroup(
            ids(1, 9),
            tuple(ids(1, 12) for _ in range(width)),
            tuple(range(g * width, (g + 1) * width)),
        )
        for g in range(4)
    ]


def _plain_gradients(model: PreTrainedModel, groups: list[PackedGroup]) -> dict[str, torch.Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for row, completion in zip(group.rows, group.completions, strict=True):
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            start = len(group.prompt_ids)
            logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0, start - 1 : -1], -1)
            total = total - (row + 1) * logprobs.gather(-1, ids[0, start:, None]).sum()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _packed_gradients(
    model: PreTrainedModel, groups: list[PackedGroup], budget: int
) -> dict[str, torch.Tensor]:
    for micro in micro_batches(groups, budget):
        batch = pack(micro, dtype=model.dtype, device="cpu")
        hidden = hidden_at_targets(model, batch)
        loss = cross_entropy(batch.target_ids_T, (batch.row_T + 1).to(hidden.dtype))
        sums = chunked_head_loss(hidden, head_weight(model), loss, tokens_per_chunk=7)
        sums.loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("fused", "even", "at_once", "kept"),
    [
        *itertools.product((True, False), (True, False), (1 << 21,), (1 << 22,)),
        # few scores at a time: groups one by one, then spans of positions; weights made again
        *itertools.product((True,), (True, False), (400, 1), (1 << 22, 0)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_the_plain_ones(
    family: str, fused: bool, even: bool, at_once: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(attention, "_SCORES_KEPT", kept)
    monkeypatch.setattr(attention, "_FEWEST_QUERIES", 5)
    plain = _family(family, torch.float64)
    groups = _groups(even)
    for budget in (10_000, 60):
        expected = _plain_gradients(copy.deepcopy(plain), groups)
        found = _packed_gradients(_ours(plain, fused), groups, budget)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            # the library's rotary tables and norms are float32, hence not 1e-12
            scale = float(grad.abs().max())
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_a_large_piece_of_work_keeps_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass saves grows with tokens, not with their square."""

    def saved(length: int) -> int:
        rng = random.Random(0)
        completions = tuple(tuple(rng.randrange(VOCAB) for _ in range(length)) for _ in range(2))
        batch = pack([PackedGroup((3, 4), completions, (0, 1))], dtype=torch.float32, device="cpu")
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            hidden_at_targets(model, batch)
        return total

    model = _ours(_family("llama", torch.float32))
    monkeypatch.setattr(attention, "_SCORES_KEPT", 0)
    first, second, third = (saved(length) for length in (33, 65, 129))
    assert third - second == 2 * (second - first)


def test_a_layer_with_an_adapter_is_left_to_the_library() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = _family("llama", torch.float32)
    layer = model.get_decoder().layers[0]
    assert parameters_of(layer) is not None
    layer.self_attn.q_proj = Adapted(64, 64, bias=False)
    assert parameters_of(layer) is None
    assert fuse_layers(model) == 1
    settings = SamplerSettings(1.0, 3, (2,), VOCAB)
    model.set_attn_implementation("headwater")
    assert len(InProcessSampler(model, settings).sample([SampleRequest((5, 6), (1, 2))])[0]) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
        ),
    ],
)
def test_a_sliding_window_is_refused(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    model.set_attn_implementation("headwater")
    assert fuse_layers(model) == 0
    sampler = InProcessSampler(model, SamplerSettings(1.0, 3, (2,), VOCAB))
    with pytest.raises(InputError, match="sliding window of 4"):
        sampler.sample([SampleRequest((5, 6), (1, 2))])


def test_outside_the_engine_a_fused_model_is_the_librarys() -> None:
    plain = _family("qwen3", torch.float32)
    model = _ours(plain)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


# --- decoding -----------------------------------------------------------------------------------


def _requests() -> list[SampleRequest]:
    rng = random.Random(1)
    return [
        SampleRequest(
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))),
            tuple(100 * p + s for s in range(1 + p % 3)),
        )
        for p in range(5)
    ]


def _check_logprobs(model: PreTrainedModel, found: list[tuple], tolerance: float) -> None:
    for rollout in (r for group in found for r in group):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        start = len(rollout.prompt_ids)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, start - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(-1, ids[0, start:, None])[:, 0]
        found_logprobs = torch.from_numpy(rollout.sampler_logprobs)
        torch.testing.assert_close(found_logprobs, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("max_rows", [512, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "compiled"),
    [
        (torch.float64, 2e-5, False),
        (torch.float32, 2e-4, False),
        (torch.float32, 2e-4, True),
        (torch.bfloat16, 0.3, False),
        (torch.bfloat16, 0.3, True),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_those_of_a_plain_forward(
    family: str,
    dtype: torch.dtype,
    tolerance: float,
    compiled: bool,
    max_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With refill: rows leave, and waiting requests enter while others are under way. Compiled:
    where this machine can."""
    monkeypatch.setenv("HEADWATER_KERNELS", str(int(compiled)))
    plain = _family(family, dtype)
    settings = SamplerSettings(1.0, 40, (2,), VOCAB)
    sampler = InProcessSampler(_ours(plain), settings, max_rows=max_rows)
    found = sampler.sample(_requests())
    assert [len(group) for group in found] == [len(r.keys) for r in _requests()]
    _check_logprobs(plain, found, tolerance)


def test_waiting_requests_take_the_places_of_finished_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long and short rows mixed: fewer steps than one full batch after the other."""
    model = _ours(_family("llama", torch.float32))
    settings = SamplerSettings(1.0, 60, tuple(range(0, VOCAB, 12)), VOCAB)
    requests = [SampleRequest((p % VOCAB,), (p,)) for p in range(64)]
    steps, entered = 0, []
    step, admit = sampling._Decoding.step, sampling._Decoding.admit

    def counted(self: sampling._Decoding) -> None:
        nonlocal steps
        steps += 1
        step(self)

    def noted(self: sampling._Decoding, entering: list[int]) -> None:
        entered.append((self.rows, len(entering)))
        admit(self, entering)

    monkeypatch.setattr(sampling._Decoding, "step", counted)
    monkeypatch.setattr(sampling._Decoding, "admit", noted)
    found = InProcessSampler(model, settings, max_rows=8).sample(requests)
    lengths = [len(group[0].response_ids) for group in found]
    one_after_another = sum(max(lengths[at : at + 8]) - 1 for at in range(0, 64, 8))
    assert max(rows + new for rows, new in entered) <= 8
    assert any(rows > 0 for rows, _ in entered)  # entered beside rows under way
    assert steps < 0.8 * one_after_another
    together = InProcessSampler(model, settings).sample(requests)
    assert [g[0].response_ids for g in found] == [g[0].response_ids for g in together]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_recorded_steps_compute_what_the_steps_do(family: str) -> None:
    """The bookkeeping around CUDA graphs, with a recorder that runs what it recorded anew."""
    model = _ours(_family(family, torch.float32))
    recordings = 0

    def record(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        nonlocal recordings
        recordings += 1
        compute()  # as a capture runs once to warm up
        return compute

    with torch.inference_mode():
        found = []
        for recorded in (False, True):
            decoder = decoder_of(model, VOCAB)
            if recorded:
                decoder = RecordedSteps(decoder, record)
            prompts = [(5, 6, 7), (8, 9, 10)]
            ids, positions, layout, _ = pack_prompts(prompts, dtype=torch.float32, device="cpu")
            decoder.prefill(ids[0], positions[0], layout)
            assert layout.capture is not None
            rows = DecodeLayout(layout.capture, [3, 3], torch.tensor([0, 0, 1]))
            outputs = []
            for step in range(40):
                tokens = torch.tensor([step % 7 + 3, step % 5 + 3, 4])
                hidden = decoder.step(tokens, torch.full((3,), 3 + step), rows)
                outputs.append(decoder.logits(hidden).clone())
                rows.advance()
            found.append(torch.stack(outputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert recordings == 2  # the cache grew once, after 32 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_product_and_what_follows_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(5, n, generator=generator).to(dtype) for n in (24, 40))
    weights = [torch.randn(n, 24, generator=generator).to(dtype) for n in (8, 32)]
    bias = torch.randn(32, generator=generator).to(dtype)
    exact = x.double() @ torch.cat(weights).double().T
    linear = PackedLinear(*weights)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    for found, expected in (
        (linear(x), exact),
        (linear.plus(x, other), exact + other.double()),
        (PackedLinear(weights[1], biases=(bias,))(x), exact[:, 8:] + bias.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-5})
        )
