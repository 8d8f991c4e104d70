"""KL divergences between teacher and student at each position, exact or over a support.

forward_kl = KL(teacher || student), mode-covering (arXiv:2605.12483, Eq. 5);
reverse_kl = KL(student || teacher), mode-seeking (arXiv:2605.12483, Eq. 4). Nats, float32.
"""

from __future__ import annotations

import torch


def forward_kl(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the last axis; both normalised log-probabilities [..., V]."""
    return _kl(teacher_logprobs, student_logprobs)


def reverse_kl(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) over the last axis; both normalised log-probabilities [..., V]."""
    return _kl(student_logprobs, teacher_logprobs)


def mixed_kl(
    teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor, forward_weight: float
) -> torch.Tensor:
    """forward_weight * forward_kl + (1 - forward_weight) * reverse_kl, over the last axis."""
    if forward_weight == 1.0:
        return forward_kl(teacher_logprobs, student_logprobs)
    if forward_weight == 0.0:
        return reverse_kl(teacher_logprobs, student_logprobs)
    return forward_weight * forward_kl(teacher_logprobs, student_logprobs) + (
        1.0 - forward_weight
    ) * reverse_kl(teacher_logprobs, student_logprobs)


def _kl(p_logprobs: torch.Tensor, q_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(p || q); outcomes to which p gives no mass (-inf) count nothing."""
    possible = torch.isfinite(p_logprobs)
    p_safe = torch.where(possible, p_logprobs, torch.zeros_like(p_logprobs))
    q_safe = torch.where(possible, q_logprobs, torch.zeros_like(q_logprobs))
    terms = torch.where(possible, p_safe.exp() * (p_safe - q_safe), torch.zeros_like(p_safe))
    return terms.sum(-1)


def with_tail(logits_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of K tokens and of all the rest in one bucket: [T, K + 1].

    logits_TV float32; ids_TK int64. At K = V the bucket is empty and holds -inf.
    """
    total = torch.logsumexp(logits_TV, dim=-1, keepdim=True)
    kept = logits_TV.gather(-1, ids_TK) - total
    if ids_TK.shape[-1] == logits_TV.shape[-1]:
        return torch.cat((kept, torch.full_like(total, -torch.inf)), dim=-1)
    rest = logits_TV.scatter(-1, ids_TK, -torch.inf)
    return torch.cat((kept, torch.logsumexp(rest, dim=-1, keepdim=True) - total), dim=-1)


def tail_of(logprobs_TK: torch.Tensor) -> torch.Tensor:
    """Append the log of the mass that K log-probabilities leave over: [T, K + 1].

    Mass below float32's resolution (1e-7) counts as none.
    """
    left = 1.0 - logprobs_TK.double().exp().sum(-1, keepdim=True)
    none = torch.full_like(left, -torch.inf)
    tail = torch.where(left > 1e-7, left.clamp_min(1e-30).log(), none)
    return torch.cat((logprobs_TK, tail.to(logprobs_TK.dtype)), dim=-1)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis of normalised log-probabilities."""
    return -(logprobs.exp() * logprobs).sum(-1)
