"""Every loss against plain float64 loops, in value and gradient; properties; the chunked head."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.losses import divergences, grpo
from headwater.losses.chunked_head import ChunkLoss
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


def _run(loss: ChunkLoss, logits: torch.Tensor) -> tuple[LossSums, torch.Tensor]:
    """Sums and gradient of `loss`, which may overwrite what it is given; the same sums without."""
    part = slice(0, logits.shape[0])
    sums, grad = loss(logits.clone(), part, True)
    alone, nothing = loss(logits.clone(), part, False)
    assert nothing is None and grad is not None
    assert not sums.loss_sum.requires_grad
    torch.testing.assert_close(alone.loss_sum, sums.loss_sum, rtol=1e-12, atol=1e-12)
    assert alone.denominator == sums.denominator
    assert alone.metrics.keys() == sums.metrics.keys()
    for name, pair in alone.metrics.items():
        assert pair == pytest.approx(sums.metrics[name]), name
    return sums, grad


def _check(
    loss: ChunkLoss,
    logits: torch.Tensor,
    expected: Callable[[list[list[float]]], float],
    *,
    weight_sum: float | None = None,
) -> LossSums:
    """Value and gradient of `loss` at `logits` against the plain loop `expected`."""
    sums, grad = _run(loss, logits)
    assert float(sums.loss_sum) == pytest.approx(expected(logits.tolist()), rel=1e-10)
    slope = torch.tensor(reference.gradient(expected, logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)
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
    if cap is not None:  # ours - sampler is -0.3, 0.3, 0, -0.1, 0.05, 0 and e^0.3 > 1.1
        assert sums.metrics["importance_weight"] == pytest.approx((sum(corrections), T))
        assert sums.metrics["importance_capped_share"] == (1.0, float(T))


def test_sampler_gap_is_taken_at_the_temperature_of_the_sampler() -> None:
    logits, teacher = _logits(5), _logits(6)
    for targets in (SampledTargets(_picked(teacher)), _full(teacher)):
        loss = distillation_loss(
            TARGETS,
            WEIGHTS,
            targets,
            forward_weight=0.0,
            sampler_logprobs_T=_picked(logits, 0.5) + torch.tensor([0.3, -0.3, 0.0, 0.1, 0.0, 0.0]),
            sampler_temperature=0.5,
        )
        assert _run(loss, logits)[0].metrics["sampler_gap"][0] == pytest.approx(0.7)


def test_sampled_token_gradient_is_the_reverse_kl_gradient_in_expectation() -> None:
    logits, teacher = _logits(7)[:1], _logits(8)[:1]
    leaf = logits.clone().requires_grad_(True)
    ours = torch.log_softmax(leaf, -1)
    divergences.reverse_kl(torch.log_softmax(teacher, -1), ours).sum().backward()
    expected = torch.zeros(1, V, dtype=torch.float64)
    for token in range(V):
        theirs = torch.log_softmax(teacher, -1)[:, token]
        loss = distillation_loss(
            torch.tensor([token]),
            torch.ones(1, dtype=torch.float64),
            SampledTargets(theirs),
            forward_weight=0.0,
        )
        expected += ours.detach()[0, token].exp() * _run(loss, logits)[1]
    torch.testing.assert_close(expected, leaf.grad, rtol=1e-12, atol=1e-14)


def _policy(
    logits: torch.Tensor, old_shift: list[float] | None, **options: object
) -> tuple[ChunkLoss, Callable[[list[list[float]]], float]]:
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

    def scaled(
        logits_TV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        sums, grad = loss(logits_TV / temperature, part, wants_gradient)
        return sums, None if grad is None else grad / temperature

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
    if cap is None:
        assert "importance_weight" not in sums.metrics
    else:  # old - sampler is 0.1, -0.2, 1.5, 0, 0.4, -0.4 and e^1.5 > 2
        weights = [min(math.exp(gap), cap) for gap in (0.1, -0.2, 1.5, 0.0, 0.4, -0.4)]
        assert sums.metrics["importance_weight"] == pytest.approx((sum(weights), T))
        assert sums.metrics["importance_capped_share"] == (1.0, float(T))


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
    theirs = divergences.tail_of(top.values, V)
    assert theirs.exp().sum(-1).item() == pytest.approx(1.0, abs=1e-6)
    one = torch.ones(1, dtype=torch.float64)
    found = divergences.top_k_kl_(
        theirs, top.indices, student.clone(), one, forward_weight, wants_gradient=False
    )
    value = float(found.kl_C)
    entropy = divergences.entropy(torch.log_softmax(student, -1))
    torch.testing.assert_close(found.entropy_C, entropy, rtol=1e-9, atol=1e-9)
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
        loss = distillation_loss(TARGETS, WEIGHTS.to(dtype), targets, forward_weight=forward_weight)
        sums, grad = loss(_logits(1).to(dtype), PART, True)
        found.append((sums.loss_sum, grad))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(found[1], found[0], **tolerance)


def test_a_teacher_that_is_sure_leaves_a_finite_reverse_kl() -> None:
    teacher = torch.tensor([[40.0, 0.0, -1.0, -2.0, -3.0]])
    top = torch.log_softmax(teacher, -1).topk(2, dim=-1)
    theirs = divergences.tail_of(top.values, 5)
    found = divergences.top_k_kl_(
        theirs, top.indices, torch.zeros(1, 5), torch.ones(1), 0.0, wants_gradient=True
    )
    bucket = 0.6 * (math.log(0.6) - math.log(1e-7))
    kept = 0.2 * (2 * math.log(0.2) - float(top.values.sum()))
    assert found.kl_C.item() == pytest.approx(bucket + kept, rel=1e-5)
    assert found.grad_CV is not None and bool(torch.isfinite(found.grad_CV).all())
    assert float(found.grad_CV[0, 0]) < 0  # towards the teacher's token


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


def test_rows_worked_on_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _logits(2)
    top = torch.log_softmax(teacher, -1).topk(3, dim=-1)
    losses = [cross_entropy(TARGETS, WEIGHTS), _policy(_logits(1), MOVED, estimator="exact")[0]]
    losses += [
        distillation_loss(TARGETS, WEIGHTS, targets, forward_weight=0.3)
        for targets in (_full(teacher), TopKTargets(top.indices, top.values))
    ]
    whole = [_run(loss, _logits(1)) for loss in losses]
    monkeypatch.setattr(divergences, "_BLOCK_ELEMENTS", 2 * V)
    for loss, (sums, grad) in zip(losses, whole, strict=True):
        again, slope = _run(loss, _logits(1))
        torch.testing.assert_close((again.loss_sum, slope), (sums.loss_sum, grad), rtol=0, atol=0)
        assert again.metrics == sums.metrics


def test_a_token_that_neither_can_say_counts_nothing() -> None:
    """A logit of -inf in both: the same value and gradient as without the token."""
    student, teacher = _logits(1), _logits(2)
    barred_student, barred_teacher = student.clone(), teacher.clone()
    for barred in (barred_student, barred_teacher):
        barred[:, 4] = -torch.inf
    others = [i for i in range(V) if i != 4]
    for forward_weight in (0.0, 0.3, 1.0):
        found = []
        for ours, theirs in (
            (barred_student, barred_teacher),
            (student[:, others], teacher[:, others]),
        ):
            kl, _ = divergences.full_kl_(
                theirs.clone(), ours.clone(), WEIGHTS, forward_weight, wants_gradient=True
            )
            assert kl.grad_CV is not None
            grad = kl.grad_CV if kl.grad_CV.shape[1] < V else kl.grad_CV[:, others]
            found.append((kl.kl_C, kl.entropy_C, grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_forward_kl_counts_nothing_where_the_teacher_has_no_mass() -> None:
    student, teacher = _logits(1), _logits(2)
    teacher[:, 4] = -torch.inf
    for weight, finite in ((1.0, True), (0.0, False)):
        kl, entropy_C = divergences.full_kl_(
            teacher.clone(), student.clone(), WEIGHTS, weight, wants_gradient=finite
        )
        assert bool(torch.isfinite(kl.kl_C).all()) is finite
        assert bool(torch.isfinite(entropy_C).all()) and bool(torch.isfinite(kl.entropy_C).all())
        if finite:
            p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
            torch.testing.assert_close(kl.grad_CV, WEIGHTS[:, None] * (p - q))


# --- impossible tokens --------------------------------------------------------------------------


def _without(logits: torch.Tensor, *tokens: int) -> torch.Tensor:
    """Logits of -inf at the tokens, in every other row."""
    impossible = logits.clone()
    impossible[::2, list(tokens)] = -torch.inf
    return impossible


def _entropy(logits: torch.Tensor) -> float:
    return sum(reference.entropy(reference.log_softmax(row)) for row in logits.tolist())


def _full_kl(teacher: torch.Tensor, forward_weight: float) -> ChunkLoss:
    """full_kl_ as a chunk loss: a matmul with a head would make NaN of -inf."""

    def loss(
        logits_TV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        found, teacher_entropy = divergences.full_kl_(
            teacher.clone(), logits_TV, WEIGHTS, forward_weight, wants_gradient
        )
        entropies = {"entropy": found.entropy_C, "teacher_entropy": teacher_entropy}
        metrics = {name: (float(x.sum()), float(T)) for name, x in entropies.items()}
        value = (WEIGHTS * found.kl_C).sum()
        return LossSums(value, float(WEIGHTS.sum()), metrics), found.grad_CV

    return loss


@pytest.mark.parametrize(
    ("forward_weight", "student_lacks", "teacher_lacks"),
    [(1.0, (2,), (2, 4)), (0.0, (2, 4), (2,)), (0.3, (2, 4), (2, 4))],
)
def test_full_kl_of_distributions_that_lack_tokens(
    forward_weight: float, student_lacks: tuple[int, ...], teacher_lacks: tuple[int, ...]
) -> None:
    logits, teacher = _without(_logits(1), *student_lacks), _without(_logits(2), *teacher_lacks)
    weights = WEIGHTS.tolist()
    sums = _check(
        _full_kl(teacher, forward_weight),
        logits,
        lambda rows: reference.distillation(rows, teacher.tolist(), weights, forward_weight, 1.0),
    )
    assert sums.metrics["entropy"][0] == pytest.approx(_entropy(logits))
    assert sums.metrics["teacher_entropy"][0] == pytest.approx(_entropy(teacher))


def test_forward_kl_to_a_student_that_lacks_a_token_is_infinite_with_a_gradient() -> None:
    student, teacher = _without(_logits(1), 4), _logits(2)
    sums, grad = _run(_full_kl(teacher, 1.0), student)
    assert sums.loss_sum.item() == math.inf
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    torch.testing.assert_close(grad, WEIGHTS[:, None] * (p - q))


@pytest.mark.parametrize(
    ("forward_weight", "lacks"),
    [(0.0, (1, 2)), (0.0, tuple(range(3, V))), (1.0, (3,)), (0.3, (7, 8))],
    ids=["kept", "all the rest", "of the rest", "mixed"],
)
def test_top_k_kl_of_a_student_that_lacks_tokens(
    forward_weight: float, lacks: tuple[int, ...]
) -> None:
    """The tokens kept are 0, 1 and 2."""
    logits, teacher = _without(_logits(3), *lacks), _logits(4)
    ids = torch.arange(3).expand(T, 3)
    targets = TopKTargets(ids, torch.log_softmax(teacher, -1)[:, :3])
    weights = WEIGHTS.tolist()
    sums = _check(
        distillation_loss(TARGETS, WEIGHTS, targets, forward_weight=forward_weight),
        logits,
        lambda rows: reference.top_k_distillation(
            rows, teacher.tolist(), ids.tolist(), weights, forward_weight
        ),
    )
    assert sums.metrics["entropy"][0] == pytest.approx(_entropy(logits))


def test_losses_of_targets_with_impossible_tokens_beside_them() -> None:
    logits, weights = _without(_logits(9), 2, 4), WEIGHTS.tolist()
    _check(
        cross_entropy(TARGETS, WEIGHTS),
        logits,
        lambda rows: reference.cross_entropy(rows, TARGETS.tolist(), weights),
    )
    loss, expected = _policy(logits, MOVED)
    sums = _check(loss, logits, expected)
    assert sums.metrics["entropy"][0] == pytest.approx(_entropy(logits))
