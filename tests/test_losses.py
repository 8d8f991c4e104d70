"""Every loss against plain float64 loops, in value and gradient; properties; the chunked head."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.losses import divergences, grpo
from headwater.losses.chunked_head import chunk_tokens, chunked_head_loss
from headwater.losses.token_losses import (
    PolicySettings,
    PolicyTerms,
    cross_entropy,
    distillation_loss,
    policy_loss,
)
from headwater.types import FullTargets, LossSums, SampledTargets, TopKTargets
from reference import losses as reference

T, V, H = 6, 9, 5
PART = slice(0, T)
TARGETS = torch.tensor([3, 0, 8, 8, 1, 5])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)


def _logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(T, V, generator=generator, dtype=torch.float64)


def _full(teacher_logits: torch.Tensor) -> FullTargets:
    """Targets whose logits are the given ones: the head is the identity."""
    return FullTargets(teacher_logits, torch.eye(V, dtype=teacher_logits.dtype))


def _picked(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(-1, TARGETS[:, None])[:, 0]


def _check(
    loss: Callable[[torch.Tensor, slice], LossSums],
    logits: torch.Tensor,
    expected: Callable[[list[list[float]]], float],
    *,
    weight_sum: float | None = None,
) -> LossSums:
    """Value and gradient of `loss` at `logits` against the plain loop `expected`."""
    leaf = logits.clone().requires_grad_(True)
    sums = loss(leaf, PART)
    assert float(sums.loss_sum.detach()) == pytest.approx(expected(logits.tolist()), rel=1e-10)
    sums.loss_sum.backward()
    slope = torch.tensor(reference.gradient(expected, logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, slope, rtol=1e-7, atol=1e-9)
    total = float(WEIGHTS.sum()) if weight_sum is None else weight_sum
    assert sums.denominator == pytest.approx(total)
    return sums


# --- golden -----------------------------------------------------------------------------------


def test_cross_entropy() -> None:
    logits = _logits(0)
    sums = _check(
        cross_entropy(TARGETS, WEIGHTS),
        logits,
        lambda rows: reference.cross_entropy(rows, TARGETS.tolist(), WEIGHTS.tolist()),
    )
    nll, count = sums.metrics["nll"]
    ones = [1.0] * T
    assert nll == pytest.approx(reference.cross_entropy(logits.tolist(), TARGETS.tolist(), ones))
    assert count == T
    hits = sum(row.index(max(row)) == y for row, y in zip(logits.tolist(), TARGETS, strict=True))
    assert sums.metrics["token_accuracy"] == (float(hits), float(T))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("forward_weight", [0.0, 1.0, 0.3])
def test_full_vocabulary_kl(forward_weight: float, temperature: float) -> None:
    logits, teacher = _logits(1), _logits(2)
    loss = distillation_loss(
        TARGETS,
        WEIGHTS,
        _full(teacher),
        forward_weight=forward_weight,
        teacher_temperature=temperature,
    )
    sums = _check(
        loss,
        logits,
        lambda rows: reference.distillation(
            rows, teacher.tolist(), WEIGHTS.tolist(), forward_weight, temperature
        ),
    )
    ones = [1.0] * T
    unweighted = reference.distillation(
        logits.tolist(), teacher.tolist(), ones, forward_weight, temperature
    )
    assert sums.metrics["kl"][0] == pytest.approx(unweighted)
    student_entropy = sum(reference.entropy(reference.log_softmax(r)) for r in logits.tolist())
    teacher_entropy = sum(
        reference.entropy(reference.log_softmax(r, temperature)) for r in teacher.tolist()
    )
    assert sums.metrics["entropy"][0] == pytest.approx(student_entropy)
    assert sums.metrics["teacher_entropy"][0] == pytest.approx(teacher_entropy)


@pytest.mark.parametrize("forward_weight", [0.0, 1.0, 0.3])
def test_top_k_kl_has_a_bucket_for_all_the_rest(forward_weight: float) -> None:
    logits, teacher = _logits(3), _logits(4)
    top = torch.log_softmax(teacher, -1).topk(3, dim=-1)
    loss = distillation_loss(
        TARGETS, WEIGHTS, TopKTargets(top.indices, top.values), forward_weight=forward_weight
    )
    _check(
        loss,
        logits,
        lambda rows: reference.top_k_distillation(
            rows, teacher.tolist(), top.indices.tolist(), WEIGHTS.tolist(), forward_weight
        ),
    )


@pytest.mark.parametrize("cap", [None, 1.1])
def test_sampled_token_policy_gradient(cap: float | None) -> None:
    logits, teacher = _logits(5), _logits(6)
    theirs = _picked(teacher)
    ours = _picked(logits)
    sampler = ours + torch.tensor([0.3, -0.3, 0.0, 0.1, -0.05, 0.0])
    loss = distillation_loss(
        TARGETS,
        WEIGHTS,
        SampledTargets(theirs),
        forward_weight=0.0,
        sampler_logprobs_T=sampler,
        importance_cap=cap,
    )
    corrections = [
        reference.importance_weight(a, b, cap)
        for a, b in zip(ours.tolist(), sampler.tolist(), strict=True)
    ]
    sums = _check(
        loss,
        logits,
        lambda rows: reference.sampled_distillation(
            rows, TARGETS.tolist(), WEIGHTS.tolist(), (theirs - ours).tolist(), corrections
        ),
    )
    assert sums.metrics["kl"][0] == pytest.approx(float((ours - theirs).sum()))
    assert sums.metrics["sampler_gap"][0] == pytest.approx(0.75)


def test_sampled_token_gradient_is_the_reverse_kl_gradient_in_expectation() -> None:
    logits, teacher = _logits(7)[:1], _logits(8)[:1]
    leaf = logits.clone().requires_grad_(True)
    ours = torch.log_softmax(leaf, -1)
    divergences.reverse_kl(torch.log_softmax(teacher, -1), ours).sum().backward()
    expected = torch.zeros(1, V, dtype=torch.float64)
    for token in range(V):
        sample = logits.clone().requires_grad_(True)
        theirs = torch.log_softmax(teacher, -1)[:, token]
        loss = distillation_loss(
            torch.tensor([token]),
            torch.ones(1, dtype=torch.float64),
            SampledTargets(theirs),
            forward_weight=0.0,
        )
        loss(sample, slice(0, 1)).loss_sum.backward()
        expected += ours.detach()[0, token].exp() * sample.grad
    torch.testing.assert_close(expected, leaf.grad, rtol=1e-12, atol=1e-14)


def _policy(
    logits: torch.Tensor, old_shift: list[float] | None, **options: object
) -> tuple[Callable[[torch.Tensor, slice], LossSums], Callable[[list[list[float]]], float]]:
    """The GRPO loss and its plain loop, for policies that moved by `old_shift` since sampling."""
    temperature = float(options.pop("temperature", 1.0))
    cap = options.pop("cap", 2.0)
    estimator = str(options.pop("estimator", "k3"))
    coefficient = float(options.pop("coefficient", 0.0))
    reference_logits = _logits(11)
    current = _picked(logits, temperature)
    shift = torch.tensor(old_shift or [0.0] * T, dtype=torch.float64)
    old = current - shift
    sampler = old - torch.tensor([0.1, -0.2, 1.5, 0.0, 0.4, -0.4])
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64)
    terms = PolicyTerms(
        TARGETS,
        advantages,
        WEIGHTS,
        sampler,
        old_logprobs_T=None if old_shift is None else old,
        reference_logprobs_T=_picked(reference_logits, temperature),
    )
    reference_targets = _full(reference_logits) if estimator == "exact" else None
    settings_ = PolicySettings(
        0.2, 0.3, cap, coefficient, estimator, reference_targets, temperature
    )
    loss = policy_loss(terms, settings_, lambda logprobs, part: None)

    def scaled(logits_TV: torch.Tensor, part: slice) -> LossSums:
        return loss(logits_TV / temperature, part)

    def expected(rows: list[list[float]]) -> float:
        return reference.policy(
            rows,
            TARGETS.tolist(),
            advantages.tolist(),
            WEIGHTS.tolist(),
            old.tolist(),
            sampler.tolist(),
            low=0.2,
            high=0.3,
            cap=cap,
            coefficient=coefficient,
            estimator=estimator,
            reference_logits=reference_logits.tolist(),
            temperature=temperature,
        )

    return scaled, expected


#: Ratios e^shift: clipped above, below, inside, and on the side where clipping does not bind.
MOVED = [math.log(1.5), math.log(0.5), 0.1, math.log(1.6), 0.2, math.log(0.6)]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_clipped_surrogate_with_importance_weights(cap: float | None) -> None:
    logits = _logits(9)
    loss, expected = _policy(logits, MOVED, cap=cap)
    sums = _check(loss, logits, expected)
    # tokens 0 (ratio 1.5 > 1.3, A > 0) and 1 (0.5 < 0.8, A < 0) are held back
    assert sums.metrics["clipped_share"] == (2.0, float(T))
    assert sums.metrics["sampler_gap"][0] == pytest.approx(0.1 + 0.2 + 1.5 + 0.4 + 0.4)


def test_clip_low_and_high_bound_the_gain_on_their_own_side() -> None:
    logprobs = torch.tensor(
        [math.log(r) for r in (1.25, 1.35, 0.75, 0.7)], dtype=torch.float64, requires_grad=True
    )
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    losses = grpo.clipped_surrogate(logprobs, torch.zeros(4), advantages, 0.28, 0.3)
    torch.testing.assert_close(
        losses.detach(), torch.tensor([-1.25, -1.3, 0.75, 0.72], dtype=torch.float64)
    )
    losses.sum().backward()
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([-1.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    )


def test_first_update_has_the_plain_policy_gradient() -> None:
    logits = _logits(9)
    loss, expected = _policy(logits, None, cap=None)
    _check(loss, logits, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_kl_penalty(estimator: str, temperature: float) -> None:
    logits = _logits(10)
    loss, expected = _policy(
        logits, MOVED, estimator=estimator, coefficient=0.4, temperature=temperature
    )
    _check(loss, logits, expected)


def test_kl_estimators_agree_with_the_exact_penalty_in_expectation() -> None:
    ours, theirs = torch.log_softmax(_logits(1), -1), torch.log_softmax(_logits(2), -1)
    exact = divergences.reverse_kl(theirs, ours)
    k3 = (ours.exp() * grpo.kl_penalty_k3(ours, theirs)).sum(-1)
    torch.testing.assert_close(k3, exact)
    # the gradient of k2, averaged over samples, is that of the exact KL
    leaf = _logits(1).requires_grad_(True)
    logprobs = torch.log_softmax(leaf, -1)
    (logprobs.detach().exp() * grpo.kl_penalty_k2(logprobs, theirs)).sum().backward()
    other = _logits(1).requires_grad_(True)
    divergences.reverse_kl(theirs, torch.log_softmax(other, -1)).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    trainer = torch.tensor([0.0, 1.0, -3.0], requires_grad=True)
    weights = grpo.importance_weights(trainer, torch.zeros(3), 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-3.0)]))
    assert not weights.requires_grad
    assert grpo.importance_weights(trainer, torch.zeros(3), None).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_normalisations(kind: str) -> None:
    rows = [[1.0, 2.0, 4.0], [8.0], [16.0, 32.0]]
    lengths = torch.tensor([len(row) for row in rows])
    weights, denominator = grpo.token_weights(lengths, kind, max_tokens=7)
    value = sum(w * x for w, row in zip(weights.tolist(), rows, strict=True) for x in row)
    assert value / denominator == pytest.approx(reference.normalised(rows, kind, 7), rel=1e-6)


# --- advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["group_std", "group_mean"])
def test_group_advantages(kind: str) -> None:
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.25, 0.5, -1.0, 3.0]]
    expected = [reference.group_advantages(row, kind == "group_std") for row in rewards]
    found = grpo.group_advantages(torch.tensor(rewards), kind)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_flat_group_is_exactly_flat_and_a_nearly_flat_one_is_not() -> None:
    third = 1.0 / 3.0  # its float32 mean over 7 is not itself
    rewards = torch.tensor([[third] * 7, [third] * 6 + [third + 1e-6]])
    assert grpo.zero_variance(rewards).tolist() == [True, False]
    advantages = grpo.group_advantages(rewards, "group_std")
    assert advantages[0].tolist() == [0.0] * 7
    assert float(advantages[1, -1]) > 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=16),
    st.sampled_from(["group_std", "group_mean"]),
)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(
    rewards: list[float], kind: str
) -> None:
    advantages = grpo.group_advantages(torch.tensor([rewards]), kind)[0]
    assert abs(float(advantages.sum())) < 1e-5
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    ordered = advantages[order].tolist()
    assert ordered == sorted(ordered)
    if kind == "group_std" and len(set(rewards)) > 1:
        assert float(advantages.square().mean()) == pytest.approx(1.0, rel=1e-4)


# --- properties of divergences ------------------------------------------------------------------

LOGITS = st.lists(
    st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V), min_size=2, max_size=2
)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0, 1))
def test_kl_is_never_negative_and_zero_at_identity(
    rows: list[list[float]], forward_weight: float
) -> None:
    a, b = (torch.log_softmax(torch.tensor(row, dtype=torch.float64), -1) for row in rows)
    assert float(divergences.mixed_kl(a, b, forward_weight)) >= -1e-12
    assert float(divergences.mixed_kl(a, a, forward_weight)) == 0.0


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(2, V), st.floats(0, 1))
def test_top_k_kl_is_a_kl_and_never_more_than_the_full_one(
    rows: list[list[float]], k: int, forward_weight: float
) -> None:
    """Merging outcomes cannot raise a KL; the bucket makes it one of two distributions."""
    student, teacher = torch.tensor(rows, dtype=torch.float64)[:, None]
    top = torch.log_softmax(teacher, -1).topk(k, dim=-1)
    ours = divergences.with_tail(student, top.indices)
    theirs = divergences.tail_of(top.values, V)
    assert ours.exp().sum(-1).item() == pytest.approx(1.0, abs=1e-12)
    assert theirs.exp().sum(-1).item() == pytest.approx(1.0, abs=1e-6)
    value = float(divergences.mixed_kl(theirs, ours, forward_weight))
    whole = float(
        divergences.mixed_kl(
            torch.log_softmax(teacher, -1), torch.log_softmax(student, -1), forward_weight
        )
    )
    assert math.isfinite(value)
    assert -1e-6 <= value <= whole + 1e-5  # a teacher's tail holds at least 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forward_weight", [0.0, 1.0, 0.3])
def test_top_k_at_the_whole_vocabulary_equals_full(
    forward_weight: float, dtype: torch.dtype
) -> None:
    teacher = _logits(2, scale=6.0).to(dtype)
    top = torch.log_softmax(teacher, -1).topk(V, dim=-1)
    found = []
    for targets in (_full(teacher), TopKTargets(top.indices, top.values)):
        leaf = _logits(1).to(dtype).requires_grad_(True)
        loss = distillation_loss(TARGETS, WEIGHTS.to(dtype), targets, forward_weight=forward_weight)
        value = loss(leaf, PART).loss_sum
        value.backward()
        found.append((value.detach(), leaf.grad))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(found[1], found[0], **tolerance)


def test_a_teacher_that_is_sure_leaves_a_finite_reverse_kl() -> None:
    teacher = torch.tensor([[40.0, 0.0, -1.0, -2.0, -3.0]])
    top = torch.log_softmax(teacher, -1).topk(2, dim=-1)
    student = torch.zeros(1, 5, requires_grad=True)
    value = divergences.reverse_kl(
        divergences.tail_of(top.values, 5), divergences.with_tail(student, top.indices)
    )
    value.sum().backward()
    bucket = 0.6 * (math.log(0.6) - math.log(1e-7))
    kept = 0.2 * (2 * math.log(0.2) - float(top.values.sum()))
    assert value.item() == pytest.approx(bucket + kept, rel=1e-5)
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())
    assert float(student.grad[0, 0]) < 0  # towards the teacher's token


@pytest.mark.parametrize("peak", [2.0, 12.0, 30.0])
def test_the_tail_of_a_large_vocabulary_is_exact(peak: float) -> None:
    vocab = 262_144
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(5))
    logits[:, 7] += peak
    ids, logprobs = divergences.top_k_logprobs(logits, 64)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, ids), rtol=1e-6, atol=1e-12)
    rest = exact.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(math.log(1e-7))
    tail = divergences.tail_of(logprobs, vocab)[:, -1]
    torch.testing.assert_close(tail.double(), rest, rtol=0, atol=0.01)


def test_top_k_of_more_than_there_are_is_everything() -> None:
    ids, logprobs = divergences.top_k_logprobs(_logits(2).float(), V + 5)
    assert [sorted(row) for row in ids.tolist()] == [list(range(V))] * T
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(T))


def test_impossible_outcomes_of_the_first_distribution_count_nothing() -> None:
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([0.25, 0.25, 0.5]).log().requires_grad_(True)
    value = divergences.forward_kl(p, q)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(q.grad, torch.tensor([-0.5, -0.5, 0.0]))
    assert divergences.reverse_kl(p, q.detach()).item() == math.inf


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


# --- chunked head -------------------------------------------------------------------------------


def _head_inputs(dtype: torch.dtype, tokens: int = T, vocab: int = V) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, H, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(True) for x in (hidden, head)]


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


def test_bfloat16_inputs_get_float32_logits_and_gradients_in_their_own_format() -> None:
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
