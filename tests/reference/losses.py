"""Losses on plain lists of floats (float64), written from their equations.

`logits` is [T][V]; every sum over tokens is a Python loop. Where the method stops a gradient, the
stopped quantity is an argument of its own, so that a numerical derivative leaves it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]
Rows = Sequence[Row]


def log_softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    total = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - total for x in scaled]


def kl(p: Row, q: Row) -> float:
    """KL(p || q) of log-probabilities; outcomes without mass under p count nothing."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf)


def mixed_kl(teacher: Row, student: Row, forward_weight: float) -> float:
    """forward_weight * KL(teacher || student) + (1 - forward_weight) * KL(student || teacher)."""
    parts = ((forward_weight, teacher, student), (1 - forward_weight, student, teacher))
    return sum(weight * kl(p, q) for weight, p, q in parts if weight)  # 0 * infinity is no part


def entropy(logprobs: Row) -> float:
    return -sum(math.exp(x) * x for x in logprobs if x > -math.inf)


def cross_entropy(logits: Rows, targets: Sequence[int], weights: Row) -> float:
    return sum(
        -weight * log_softmax(row)[target]
        for row, target, weight in zip(logits, targets, weights, strict=True)
    )


def distillation(
    logits: Rows, teacher_logits: Rows, weights: Row, forward_weight: float, temperature: float
) -> float:
    total = 0.0
    for row, theirs, weight in zip(logits, teacher_logits, weights, strict=True):
        student, teacher = log_softmax(row), log_softmax(theirs, temperature)
        total += weight * mixed_kl(teacher, student, forward_weight)
    return total


def bucketed(logprobs: Row, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids`, then of everything else together."""
    kept = [logprobs[i] for i in ids]
    rest = sum(math.exp(x) for i, x in enumerate(logprobs) if i not in ids)
    return [*kept, math.log(rest) if rest > 0 else -math.inf]


def top_k_distillation(
    logits: Rows,
    teacher_logits: Rows,
    ids: Sequence[Sequence[int]],
    weights: Row,
    forward_weight: float,
) -> float:
    total = 0.0
    for row, theirs, kept, weight in zip(logits, teacher_logits, ids, weights, strict=True):
        student = bucketed(log_softmax(row), kept)
        teacher = bucketed(log_softmax(theirs), kept)
        total += weight * mixed_kl(teacher, student, forward_weight)
    return total


def sampled_distillation(
    logits: Rows,
    targets: Sequence[int],
    weights: Row,
    stopped_advantages: Row,
    stopped_corrections: Row,
) -> float:
    """-w c A log pi(target): a policy gradient with A = log pi_T - log pi held fixed."""
    total = 0.0
    for t, row in enumerate(logits):
        logprob = log_softmax(row)[targets[t]]
        total -= weights[t] * stopped_corrections[t] * stopped_advantages[t] * logprob
    return total


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    clipped = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, clipped * advantage)


def importance_weight(trainer: float, sampler: float, cap: float | None) -> float:
    return 1.0 if cap is None else min(math.exp(trainer - sampler), cap)


def kl_estimate(kind: str, logprob: float, reference: float) -> float:
    log_ratio = logprob - reference
    if kind == "k2":
        return log_ratio**2 / 2
    return math.exp(-log_ratio) - 1 + log_ratio


def policy(
    logits: Rows,
    targets: Sequence[int],
    advantages: Row,
    weights: Row,
    old: Row,
    sampler: Row,
    *,
    low: float,
    high: float,
    cap: float | None,
    coefficient: float = 0.0,
    estimator: str = "k3",
    reference_logits: Rows | None = None,
    temperature: float = 1.0,
) -> float:
    """Clipped surrogate with fixed importance weights, plus the penalty against a reference."""
    total = 0.0
    for t, row in enumerate(logits):
        logprobs = log_softmax(row, temperature)
        logprob = logprobs[targets[t]]
        ratio = math.exp(logprob - old[t])
        correction = importance_weight(old[t], sampler[t], cap)
        value = correction * surrogate(ratio, advantages[t], low, high)
        if coefficient:
            assert reference_logits is not None
            reference = log_softmax(reference_logits[t], temperature)
            if estimator == "exact":
                value += coefficient * kl(logprobs, reference)
            else:
                value += coefficient * kl_estimate(estimator, logprob, reference[targets[t]])
        total += weights[t] * value
    return total


def group_advantages(rewards: Row, divide_by_std: bool) -> list[float]:
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    scale = math.sqrt(variance) if divide_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def normalised(token_losses: Rows, kind: str, max_tokens: int) -> float:
    """The mean that a normalisation names, over rows of different lengths."""
    if kind == "token":
        return sum(map(sum, token_losses)) / sum(map(len, token_losses))
    if kind == "sequence":
        return sum(sum(row) / len(row) for row in token_losses) / len(token_losses)
    return sum(map(sum, token_losses)) / (len(token_losses) * max_tokens)


def adamw(
    weight: float,
    gradients: Row,
    rates: Row,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
) -> float:
    """A weight after AdamW updates (arXiv:1711.05101, Alg. 2, decay multiplied by the rate)."""
    first = second = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        weight -= rate * weight_decay * weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = second / (1 - betas[1] ** step)
        weight -= rate * first / (1 - betas[0] ** step) / (math.sqrt(corrected) + eps)
    return weight


def gradient(f: Callable[[list[list[float]]], float], at: Rows, h: float = 1e-5) -> list:
    """Numerical gradient of f over [T][V] by fourth-order central differences."""
    rows = [list(row) for row in at]
    slopes = []
    for row in rows:
        slopes.append([])
        for i, x in enumerate(row):
            values = []
            for shift in (-2 * h, -h, h, 2 * h):
                row[i] = x + shift
                values.append(f(rows))
            row[i] = x
            a, b, c, d = values
            slopes[-1].append((a - 8 * b + 8 * c - d) / (12 * h))
    return slopes
