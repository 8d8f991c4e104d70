"""The head fused with every loss: values and gradients are those of one plain computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from headwater.losses import chunked_head
from headwater.losses.chunked_head import ChunkLoss, chunk_tokens, chunked_head_loss
from headwater.losses.divergences import full_kl_
from headwater.losses.token_losses import (
    PolicySettings,
    PolicyTerms,
    cross_entropy,
    distillation_loss,
    policy_loss,
)
from headwater.types import FullTargets, LossSums, SampledTargets, TopKTargets

T, V, H, K = 6, 9, 5, 3
TARGETS = torch.tensor([3, 0, 8, 8, 1, 5])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64)
#: How far the policy has moved since its old log-probabilities, and those since sampling.
MOVED = torch.tensor([0.4, -0.7, 0.1, 0.47, 0.2, -0.5], dtype=torch.float64)
GAP = torch.tensor([0.1, -0.2, 1.5, 0.0, 0.4, -0.4], dtype=torch.float64)
CAP = 1.3

#: From all log-probabilities [T, V] at the loss's temperature to the plain loss.
Plain = Callable[[torch.Tensor], torch.Tensor]


def _random(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _picked(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(-1, TARGETS[:, None])[:, 0]


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _mixed(teacher: torch.Tensor, student: torch.Tensor, forward_weight: float) -> torch.Tensor:
    forward, reverse = _kl(teacher, student), _kl(student, teacher)
    return (WEIGHTS * (forward_weight * forward + (1 - forward_weight) * reverse)).sum()


def _cross_entropy(here: torch.Tensor, temperature: float) -> tuple[ChunkLoss, Plain]:
    return cross_entropy(TARGETS, WEIGHTS), lambda logprobs: -(WEIGHTS * _picked(logprobs)).sum()


def _policy(estimator: str | None) -> Callable[[torch.Tensor, float], tuple[ChunkLoss, Plain]]:
    def make(here: torch.Tensor, temperature: float) -> tuple[ChunkLoss, Plain]:
        old = _picked(here) - MOVED
        sampler = old - GAP
        theirs_TH, their_head = _random(5, T, H), _random(6, V, H)
        theirs = torch.log_softmax(theirs_TH @ their_head.T / temperature, -1)
        terms = PolicyTerms(TARGETS, ADVANTAGES, WEIGHTS, sampler, old, _picked(theirs))
        full = FullTargets(theirs_TH, their_head) if estimator == "exact" else None
        coefficient = 0.0 if estimator is None else 0.4
        settings = PolicySettings(0.2, 0.3, CAP, coefficient, estimator or "k3", full, temperature)

        def plain(logprobs: torch.Tensor) -> torch.Tensor:
            ratio = (_picked(logprobs) - old).exp()
            clipped = torch.where(ADVANTAGES > 0, ratio.clamp_max(1.3), ratio.clamp_min(0.8))
            value = -(sampler - old).neg().exp().clamp_max(CAP) * clipped * ADVANTAGES
            log_ratio = _picked(logprobs) - _picked(theirs)
            penalty = {
                None: torch.zeros(()),
                "k2": log_ratio**2 / 2,
                "k3": (-log_ratio).exp() - 1 + log_ratio,
                "exact": _kl(logprobs, theirs),
            }[estimator]
            return (WEIGHTS * (value + coefficient * penalty)).sum()

        return policy_loss(terms, settings, lambda logprobs, part: None), plain

    return make


def _full(forward_weight: float) -> Callable[[torch.Tensor, float], tuple[ChunkLoss, Plain]]:
    def make(here: torch.Tensor, temperature: float) -> tuple[ChunkLoss, Plain]:
        theirs_TH, their_head = _random(5, T, H), _random(6, V, H)
        theirs = torch.log_softmax(theirs_TH @ their_head.T / 1.4, -1)
        loss = distillation_loss(
            TARGETS,
            WEIGHTS,
            FullTargets(theirs_TH, their_head),
            forward_weight=forward_weight,
            teacher_temperature=1.4,
            sampler_logprobs_T=_picked(here),
            sampler_temperature=0.8,
        )
        return loss, lambda logprobs: _mixed(theirs, logprobs, forward_weight)

    return make


def _top_k(forward_weight: float) -> Callable[[torch.Tensor, float], tuple[ChunkLoss, Plain]]:
    def make(here: torch.Tensor, temperature: float) -> tuple[ChunkLoss, Plain]:
        top = torch.log_softmax(_random(7, T, V), -1).topk(K, dim=-1)
        targets = TopKTargets(top.indices, top.values)
        loss = distillation_loss(TARGETS, WEIGHTS, targets, forward_weight=forward_weight)

        def bucketed(kept: torch.Tensor) -> torch.Tensor:
            rest = (1 - kept.exp().sum(-1, keepdim=True)).log()
            return torch.cat((kept, rest), -1)

        def plain(logprobs: torch.Tensor) -> torch.Tensor:
            student = bucketed(logprobs.gather(-1, top.indices))
            return _mixed(bucketed(top.values), student, forward_weight)

        return loss, plain

    return make


def _sampled(here: torch.Tensor, temperature: float) -> tuple[ChunkLoss, Plain]:
    theirs = _picked(torch.log_softmax(_random(7, T, V), -1))
    sampler = _picked(here) - GAP
    loss = distillation_loss(
        TARGETS,
        WEIGHTS,
        SampledTargets(theirs),
        forward_weight=0.0,
        sampler_logprobs_T=sampler,
        importance_cap=CAP,
    )

    def plain(logprobs: torch.Tensor) -> torch.Tensor:
        ours = _picked(logprobs)
        advantage = (theirs - ours).detach()
        correction = (ours - sampler).detach().exp().clamp_max(CAP)
        return -(WEIGHTS * correction * advantage * ours).sum()

    return loss, plain


LOSSES: dict[str, Callable[[torch.Tensor, float], tuple[ChunkLoss, Plain]]] = {
    "cross-entropy": _cross_entropy,
    "policy": _policy(None),
    "policy-k2": _policy("k2"),
    "policy-k3": _policy("k3"),
    "policy-exact": _policy("exact"),
    "forward": _full(1.0),
    "reverse": _full(0.0),
    "mixed": _full(0.3),
    "top-k-forward": _top_k(1.0),
    "top-k-reverse": _top_k(0.0),
    "top-k-mixed": _top_k(0.3),
    "sampled": _sampled,
}


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_the_plain_gradient(name: str, temperature: float, size: int) -> None:
    hidden, head = (x.requires_grad_(True) for x in (_random(1, T, H), _random(2, V, H)))
    logprobs = torch.log_softmax(hidden @ head.T / temperature, -1)
    loss, plain = LOSSES[name](logprobs.detach(), temperature)
    value = plain(logprobs)
    expected = torch.autograd.grad(3.0 * value, (hidden, head))
    sums = chunked_head_loss(hidden, head, loss, temperature=temperature, tokens_per_chunk=size)
    found = torch.autograd.grad(3.0 * sums.loss_sum, (hidden, head))
    torch.testing.assert_close(sums.loss_sum, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert sums.denominator == pytest.approx(float(WEIGHTS.sum()))
    for total, count in sums.metrics.values():
        assert math.isfinite(total) and count == T
    with torch.no_grad():
        value_only = chunked_head_loss(hidden, head, loss, temperature=temperature)
    assert not value_only.loss_sum.requires_grad
    torch.testing.assert_close(value_only.loss_sum, sums.loss_sum, rtol=1e-12, atol=1e-12)


def test_padding_rows_of_a_larger_vocabulary_carry_no_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    teacher_hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    padded = torch.cat((head, 10 * torch.ones(4, H, dtype=torch.float64)))
    found = []
    for teacher_head in (head, padded):
        leaf = hidden.clone().requires_grad_(True)
        loss = distillation_loss(
            TARGETS, WEIGHTS, FullTargets(teacher_hidden, teacher_head), forward_weight=0.5
        )
        sums = chunked_head_loss(leaf, head, loss)
        sums.loss_sum.backward()
        found.append((sums.loss_sum.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def _head_inputs(dtype: torch.dtype, tokens: int = T) -> list[torch.Tensor]:
    return [x.to(dtype).requires_grad_(True) for x in (_random(3, tokens, H), _random(4, V, H))]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_chunk_size_changes_neither_value_nor_gradient(size: int, temperature: float) -> None:
    hidden, head = _head_inputs(torch.float64)
    logits = hidden @ head.T / temperature
    whole = -(WEIGHTS * torch.log_softmax(logits, -1)[range(T), TARGETS]).sum()
    expected = torch.autograd.grad(3.0 * whole, (hidden, head))
    sums = chunked_head_loss(
        hidden,
        head,
        cross_entropy(TARGETS, WEIGHTS),
        temperature=temperature,
        tokens_per_chunk=size,
    )
    assert sums.loss_sum.dtype == torch.float64
    torch.testing.assert_close(sums.loss_sum, whole, rtol=1e-14, atol=0)
    found = torch.autograd.grad(3.0 * sums.loss_sum, (hidden, head))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert sums.denominator == pytest.approx(float(WEIGHTS.sum()))
    assert sums.metrics["nll"][1] == T


@pytest.mark.parametrize("chunks_held", [1, 2, 100])
def test_bfloat16_inputs_get_float32_logits_and_gradients_in_their_own_format(
    chunks_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_head, "_HELD_ELEMENTS", chunks_held * 4 * V)
    hidden, head = _head_inputs(torch.bfloat16)
    sums = chunked_head_loss(
        hidden, head, cross_entropy(TARGETS, WEIGHTS.float()), tokens_per_chunk=4
    )
    sums.loss_sum.backward()
    assert sums.loss_sum.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert head.grad is not None and head.grad.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_(True) for x in (hidden, head)]
    logits = exact[0] @ exact[1].T
    (-(WEIGHTS * torch.log_softmax(logits, -1)[range(T), TARGETS]).sum()).backward()
    for found, leaf in zip((hidden.grad, head.grad), exact, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            found.double(), leaf.grad, rtol=0.03, atol=0.02 * float(leaf.grad.abs().max())
        )


def test_no_tokens_give_a_zero_attached_to_the_graph() -> None:
    hidden, head = _head_inputs(torch.float32, tokens=0)
    nothing = torch.zeros(0)
    sums = chunked_head_loss(hidden, head, cross_entropy(nothing.long(), nothing))
    sums.loss_sum.backward()
    assert (sums.loss_sum.item(), sums.denominator) == (0.0, 0)
    assert head.grad is not None and float(head.grad.abs().max()) == 0.0


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches the number of elements of every tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_at_a_quarter_million_tokens_logits_exist_a_chunk_at_a_time() -> None:
    vocab, tokens, width = 262_144, 150, 16
    assert chunk_tokens(vocab) == 64
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_(True)
    head = (torch.randn(vocab, width, generator=generator) / 2).requires_grad_(True)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    with _LargestTensor() as largest:
        sums = chunked_head_loss(hidden, head, cross_entropy(targets, torch.ones(tokens)))
        sums.loss_sum.backward()
    assert largest.elements == 64 * vocab  # and not 150 * vocab
    logprobs = torch.log_softmax(hidden.detach().double() @ head.detach().double().T, -1)
    expected = -logprobs.gather(-1, targets[:, None]).sum()
    assert sums.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    probabilities = logprobs.exp().scatter_add(
        -1, targets[:, None], -torch.ones(tokens, 1, dtype=torch.float64)
    )
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad.double(), probabilities @ head.detach().double(), rtol=1e-4, atol=1e-5
    )


def test_a_full_kl_makes_no_third_tensor_of_its_size() -> None:
    vocab, tokens = 262_144, 24
    student, teacher = (_random(seed, tokens, vocab).float() for seed in (1, 2))
    weights = torch.linspace(0.5, 2.0, tokens)
    ours, theirs = student.double(), teacher.double()
    p, log_ratio = torch.softmax(ours, -1), ours.log_softmax(-1) - theirs.log_softmax(-1)
    reverse = (p * log_ratio).sum(-1, keepdim=True)
    expected = weights.double()[:, None] * p * (log_ratio - reverse)
    with _LargestTensor() as largest:
        found, _ = full_kl_(teacher, student, weights, 0.0, wants_gradient=True)
    assert largest.elements <= student.numel() // 4
    torch.testing.assert_close(found.kl_C.double(), reverse[:, 0], rtol=1e-5, atol=0)
    assert found.grad_CV is not None
    assert found.grad_CV.data_ptr() == teacher.data_ptr()
    torch.testing.assert_close(found.grad_CV.double(), expected, rtol=1e-3, atol=1e-9)


class _LargeTensors(torch.utils._python_dispatch.TorchDispatchMode):
    """The most memories of at least so many elements that are alive at once."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.most = elements, 0
        self._alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            memory = out.untyped_storage()
            if memory.nbytes() >= self.elements * out.element_size():
                reference = StorageWeakRef(memory)
                self._alive[reference.cdata] = reference
        self._alive = {key: x for key, x in self._alive.items() if not x.expired()}
        self.most = max(self.most, len(self._alive))
        return out


def test_a_full_kl_over_many_chunks_keeps_two_tensors_of_a_chunk() -> None:
    vocab, tokens, width, chunk = 262_144, 40, 8, 16
    weights, targets = torch.linspace(0.5, 2.0, tokens), torch.zeros(tokens, dtype=torch.long)
    hidden, theirs_TH = (_random(seed, tokens, width).float() for seed in (1, 2))
    head, their_head = (_random(seed, vocab, width).float() for seed in (3, 4))
    teacher = FullTargets(theirs_TH, their_head)
    loss = distillation_loss(targets, weights, teacher, forward_weight=0.3)
    leaves = [x.clone().requires_grad_(True) for x in (hidden, head)]
    with _LargeTensors(chunk * vocab) as large:
        sums = chunked_head_loss(*leaves, loss, tokens_per_chunk=chunk)
        sums.loss_sum.backward()
    assert large.most == 2  # logits and the teacher's; heads and blocks are smaller
    exact = [x.double().requires_grad_(True) for x in (hidden, head)]
    p = torch.log_softmax(exact[0] @ exact[1].T, -1)
    q = torch.log_softmax(theirs_TH.double() @ their_head.double().T, -1)
    expected = (weights * (0.3 * _kl(q, p) + 0.7 * _kl(p, q))).sum()
    expected.backward()
    # over so many tokens log_softmax in float32 is off by 1e-5 on a CPU
    assert sums.loss_sum.item() == pytest.approx(expected.item(), rel=1e-4)
    for leaf, plain in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and plain.grad is not None
        torch.testing.assert_close(
            leaf.grad.double(), plain.grad, rtol=0, atol=1e-3 * float(plain.grad.abs().max())
        )


def test_a_gradient_is_made_only_where_one_is_wanted() -> None:
    hidden, head = _head_inputs(torch.float64)
    plain = cross_entropy(TARGETS, WEIGHTS)
    asked: list[bool] = []

    def loss(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        asked.append(wants_gradient)
        return plain(logits_CV, part, wants_gradient)

    both = chunked_head_loss(hidden, head, loss)
    expected = torch.autograd.grad(both.loss_sum, (hidden, head))
    only_hidden = chunked_head_loss(hidden, head.detach(), loss)
    only_head = chunked_head_loss(hidden.detach(), head, loss)
    found = [
        torch.autograd.grad(sums.loss_sum, leaf)[0]
        for sums, leaf in ((only_hidden, hidden), (only_head, head))
    ]
    torch.testing.assert_close(found, list(expected), rtol=0, atol=0)
    assert asked == [True] * 3
    frozen = chunked_head_loss(hidden.detach(), head.detach(), loss)
    with torch.no_grad():
        unrecorded = chunked_head_loss(hidden, head, loss)
    assert asked[3:] == [False] * 2
    for sums in (frozen, unrecorded):
        assert not sums.loss_sum.requires_grad
        assert sums.loss_sum == both.loss_sum and sums.metrics == both.metrics
    assert hidden.grad is None and head.grad is None
