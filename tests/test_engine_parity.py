"""The fast computations equal the plain ones: prefix sharing, packing, sampling, chunking."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.fused_layers import fuse_layers
from headwater.engine.packing import PackedGroup, micro_batches, pack
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.models.tiny import tiny_model
from headwater.rollout.drawing import draw_tokens
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings

VOCAB = 60


def _model(dtype: torch.dtype, attention: str, name: str = "student") -> torch.nn.Module:
    model = tiny_model(name, seed=3).to(dtype)
    with torch.no_grad():  # a random head is flat: make log-probabilities differ
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    model.set_attn_implementation(attention)
    if attention == "headwater":
        assert fuse_layers(model) == len(model.get_decoder().layers)
    return model


def _groups(seed: int, count: int = 4, width: int = 3) -> list[PackedGroup]:
    rng = random.Random(seed)
    groups = []
    for g in range(count):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9)))
        completions = tuple(
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))) for _ in range(width)
        )
        rows = tuple(range(g * width, (g + 1) * width))
        groups.append(PackedGroup(prompt, completions, rows))
    return groups


def _plain_loss(model: torch.nn.Module, groups: list[PackedGroup]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for row, completion in zip(group.rows, group.completions, strict=True):
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            logits = model(ids, use_cache=False).logits[0]
            start = len(group.prompt_ids)
            logprobs = torch.log_softmax(logits[start - 1 : -1], -1)
            total = total - (row + 1) * logprobs.gather(-1, ids[0, start:, None]).sum()
    return total


def _packed_loss(
    model: torch.nn.Module, groups: list[PackedGroup], budget: int, chunk: int
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for micro in micro_batches(groups, budget):
        batch = pack(micro, dtype=next(model.parameters()).dtype, device="cpu")
        hidden = hidden_at_targets(model, batch)
        weights = (batch.row_T + 1).to(hidden.dtype)
        loss = cross_entropy(batch.target_ids_T, weights)
        sums = chunked_head_loss(hidden, head_weight(model), loss, tokens_per_chunk=chunk)
        total = total + sums.loss_sum
    return total


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(("budget", "chunk"), [(10_000, 1000), (40, 7)])
@pytest.mark.parametrize("fused", [True, False])
def test_packed_loss_and_gradient_equal_plain_ones(
    name: str, budget: int, chunk: int, fused: bool
) -> None:
    plain_model = _model(torch.float64, "sdpa", name)
    packed_model = copy.deepcopy(plain_model)
    packed_model.set_attn_implementation("headwater")
    if fused:
        fuse_layers(packed_model)
    groups = _groups(1)
    plain = _plain_loss(plain_model, groups)
    packed = _packed_loss(packed_model, groups, budget, chunk)
    assert packed.item() == pytest.approx(plain.item(), rel=1e-6)
    plain.backward()
    packed.backward()
    for (key, p), q in zip(plain_model.named_parameters(), packed_model.parameters(), strict=True):
        # rotary tables and norms are float32 inside transformers, hence not 1e-12
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=2e-6 * scale, msg=key)


def _sample(model: torch.nn.Module, width: int, prompts: int, limit: int = 40, **settings: object):
    rng = random.Random(0)
    requests = [
        SampleRequest(
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(2, 11))),
            tuple(1000 * p + s for s in range(width)),
        )
        for p in range(prompts)
    ]
    options = SamplerSettings(1.0, limit, end_ids=(2,), vocab_size=VOCAB)
    sampler = InProcessSampler(model, options, **settings)
    return requests, sampler.sample(requests)


def test_sampler_logprobs_are_those_of_a_plain_forward_and_rows_end_at_the_end_token() -> None:
    model = _model(torch.float32, "headwater", "teacher")
    _, groups = _sample(model, width=5, prompts=6)
    model.set_attn_implementation("sdpa")
    lengths = set()
    for rollout in (r for g in groups for r in g):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logits = model(ids, use_cache=False).logits[0, :, :VOCAB]
        start = len(rollout.prompt_ids)
        logprobs = torch.log_softmax(logits[start - 1 : -1], -1)
        expected = logprobs.gather(-1, ids[0, start:, None])[:, 0]
        torch.testing.assert_close(
            torch.from_numpy(rollout.sampler_logprobs), expected, rtol=1e-4, atol=1e-4
        )
        assert 2 not in rollout.response_ids[:-1]
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == 2)
        lengths.add(len(rollout.response_ids))
    assert len(lengths) > 5  # rows left at different times, also after the cache grew
    assert max(lengths) == 40


def test_samples_do_not_depend_on_what_else_is_in_the_batch() -> None:
    model = _model(torch.float32, "headwater")
    requests, together = _sample(model, width=4, prompts=5)
    _, in_pieces = _sample(model, width=4, prompts=5, max_rows=4)
    sampler = InProcessSampler(model, SamplerSettings(1.0, 40, (2,), VOCAB))
    alone = sampler.sample([SampleRequest(requests[3].prompt_ids, requests[3].keys[1:2])])[0]
    assert [[r.response_ids for r in g] for g in together] == [
        [r.response_ids for r in g] for g in in_pieces
    ]
    assert alone[0].response_ids == together[3][1].response_ids


def test_sampled_tokens_follow_the_model_distribution() -> None:
    model = _model(torch.float32, "headwater")
    options = SamplerSettings(0.7, 1, (2,), VOCAB)
    request = SampleRequest((5, 6, 7), tuple(range(20_000)))
    rollouts = InProcessSampler(model, options, max_rows=20_000).sample([request])[0]
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=VOCAB)
    model.set_attn_implementation("sdpa")
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1, :VOCAB]
    expected = torch.softmax(logits / 0.7, -1) * 20_000
    chi2 = ((counts - expected) ** 2 / expected.clamp_min(1e-9))[expected > 5].sum().item()
    degrees = int((expected > 5).sum())
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


@pytest.fixture(params=["0", "1"], ids=["torch", "compiled"])
def either_draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch, and by the compiled kernels where this machine has them."""
    monkeypatch.setenv("HEADWATER_KERNELS", request.param)


@pytest.mark.usefixtures("either_draw")
def test_a_draw_at_the_very_end_takes_no_impossible_token() -> None:
    """u * total may round up to the total, which no cumulative probability exceeds."""
    settings = SamplerSettings(1.0, 1, end_ids=(2,), vocab_size=3)
    logits = torch.tensor([[5.0, 1.0, -200.0]]).repeat(2, 1)
    expected = torch.log_softmax(logits[0], 0)
    uniforms = torch.tensor([1.0, 1e-8])
    token, logprob = draw_tokens(logits, uniforms, settings, torch.tensor([2]))
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logprob, expected[token])


@pytest.mark.usefixtures("either_draw")
@pytest.mark.parametrize("vocab", [5, 512, 700, 1024, 49_152, 300_000])
def test_a_draw_inverts_the_cumulative_distribution(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(64, vocab, generator=generator)
    logits[:, 1::3] = -torch.inf
    logits[:, 0] = -torch.inf
    uniforms = torch.rand(64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1.0])
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    settings = SamplerSettings(0.7, 1, end_ids=(), vocab_size=vocab)
    token, logprob = draw_tokens(logits.clone(), uniforms, settings, torch.tensor([]).long())
    picked = expected.gather(1, token[:, None])[:, 0]
    assert bool(torch.isfinite(picked).all())
    torch.testing.assert_close(logprob.double(), picked, rtol=1e-5, atol=1e-5)
    upto = expected.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
    assert bool((upto >= uniforms - 1e-5).all())
    assert bool((upto - picked.exp() <= uniforms + 1e-5).all())


@pytest.mark.usefixtures("either_draw")
@pytest.mark.parametrize("vocab", [5, 1000, 1024])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_give_a_token_and_no_number(vocab: int, bad: float) -> None:
    """The trainer refuses what follows from them in words; sampling must get that far."""
    logits = torch.zeros(3, vocab)
    logits[1, 2] = bad
    settings = SamplerSettings(1.0, 1, end_ids=(), vocab_size=vocab)
    token, logprob = draw_tokens(logits, torch.rand(3), settings, torch.tensor([]).long())
    assert bool((token < vocab).all())
    assert not bool(torch.isfinite(logprob[1]))


@pytest.mark.parametrize("vocab", [7, 600])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.3, None), (0.9, None), (1.0, 5), (0.6, 4)])
def test_filters_keep_the_likeliest_tokens(vocab: int, top_p: float, top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = 2 * torch.randn(32, vocab, generator=generator)
    uniforms = torch.rand(32, generator=generator)
    settings = SamplerSettings(0.8, 1, (), vocab, top_p=top_p, top_k=top_k)
    token, logprob = draw_tokens(logits.clone(), uniforms, settings, torch.tensor([]).long())
    for row in range(32):
        mass = torch.softmax(logits[row].double() / 0.8, 0)
        order = mass.argsort(descending=True).tolist()[: top_k or vocab]
        kept, reached = [], 0.0
        whole = float(mass[order].sum())
        for one in order:  # the fewest that reach top_p of what top_k leaves
            kept.append(one)
            reached += float(mass[one]) / whole
            if reached >= top_p:
                break
        assert int(token[row]) in kept
        expected = torch.log(mass[token[row]] / mass[kept].sum())
        torch.testing.assert_close(logprob[row].double(), expected, rtol=1e-4, atol=1e-4)
