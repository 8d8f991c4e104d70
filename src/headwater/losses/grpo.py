"""Group-relative policy optimisation: advantages, the clipped surrogate, the KL penalty.

DeepSeekMath (arXiv:2402.03300), with token / sequence / constant normalisation and mean-only
advantages of Dr. GRPO (arXiv:2503.20783), and clip_high of DAPO (arXiv:2503.14476).
"""

from __future__ import annotations

from typing import Literal

import torch


def group_advantages(
    rewards_PG: torch.Tensor, kind: Literal["group_std", "group_mean"]
) -> torch.Tensor:
    """Rewards minus their group's mean, over the group's population standard deviation if asked.

    A group whose raw rewards are all equal (exactly) has advantage zero. float32 [P, G].
    """
    rewards_PG = rewards_PG.float()
    centred = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    flat = zero_variance(rewards_PG)[:, None]
    if kind == "group_std":
        deviation = rewards_PG.std(-1, keepdim=True, unbiased=False)
        centred = centred / torch.where(flat, torch.ones_like(deviation), deviation)
    return torch.where(flat, torch.zeros_like(centred), centred)


def zero_variance(rewards_PG: torch.Tensor) -> torch.Tensor:
    """bool [P]: groups whose rewards are all exactly equal, which carry no gradient."""
    return (rewards_PG == rewards_PG[:, :1]).all(-1)


def clipped_surrogate(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, r = exp(logp - old logp)."""
    ratio = (logprobs_T - old_logprobs_T).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages_T, clipped * advantages_T)


def importance_weights(
    trainer_logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor, cap: float | None
) -> torch.Tensor:
    """Truncated importance weights min(exp(trainer - sampler), cap); ones without a cap."""
    if cap is None:
        return torch.ones_like(trainer_logprobs_T)
    return (trainer_logprobs_T - sampler_logprobs_T).exp().clamp_max(cap).detach()


def kl_penalty_k2(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k2 = (log pi - log pi_ref)^2 / 2; its gradient is that of KL(pi || pi_ref) on-policy."""
    return 0.5 * (logprobs_T - reference_logprobs_T).square()


def kl_penalty_k3(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k3 = r - 1 - log r with r = pi_ref / pi: unbiased value, never negative."""
    log_ratio = reference_logprobs_T - logprobs_T
    return log_ratio.exp() - 1.0 - log_ratio


def token_weights(
    lengths_N: torch.Tensor,
    kind: Literal["token", "sequence", "constant"],
    max_tokens: int,
) -> tuple[torch.Tensor, float]:
    """Weight of each row's tokens, and the global denominator, for a named normalisation.

    token: sum over tokens / number of tokens. sequence: mean over rows of each row's token
    mean. constant: sum over tokens / (rows * max_tokens). lengths_N int64; returns float32 [N].
    """
    rows = lengths_N.shape[0]
    if kind == "token":
        return torch.ones(rows), float(lengths_N.sum())
    if kind == "sequence":
        return 1.0 / lengths_N.clamp_min(1).float(), float(rows)
    return torch.ones(rows), float(rows * max_tokens)
