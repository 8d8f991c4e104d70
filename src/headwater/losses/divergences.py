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


#: The least mass a tail is taken to have: what float32 log-probabilities can tell from none.
_LEAST_TAIL = 1e-7


def with_tail(logits_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of K tokens and of all the rest in one bucket: [T, K + 1].

    logits_TV float32; ids_TK int64. At K = V nothing is left over and there is no bucket: [T, V].
    """
    total = torch.logsumexp(logits_TV, dim=-1, keepdim=True)
    kept = logits_TV.gather(-1, ids_TK) - total
    if ids_TK.shape[-1] == logits_TV.shape[-1]:
        return kept
    rest = logits_TV.scatter(-1, ids_TK, -torch.inf)
    return torch.cat((kept, torch.logsumexp(rest, dim=-1, keepdim=True) - total), dim=-1)


def top_k_logprobs(logits_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely tokens and their log-probabilities: int64 and float32, [T, k].

    The rest is summed apart from them: a float32 sum over a large vocabulary is off by 1e-5, more
    than what a sure model leaves over, and `tail_of` takes the difference from 1.
    """
    top = logits_TV.topk(min(k, logits_TV.shape[-1]), dim=-1)
    rest = logits_TV.scatter(-1, top.indices, -torch.inf)
    rest = torch.logsumexp(rest, dim=-1, keepdim=True).double()
    kept = top.values.double()
    total = torch.logsumexp(torch.cat((kept, rest), dim=-1), dim=-1, keepdim=True)
    return top.indices, (kept - total).float()


def tail_of(logprobs_TK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Append the log of the mass that K log-probabilities leave over, as `with_tail` does.

    A teacher that is sure leaves less than float32 can tell from nothing; the bucket then holds
    1e-7, so that a reverse KL from a student who is less sure stays finite.
    """
    if logprobs_TK.shape[-1] == vocab_size:
        return logprobs_TK
    left = 1.0 - logprobs_TK.double().exp().sum(-1, keepdim=True)
    tail = left.clamp_min(_LEAST_TAIL).log()
    return torch.cat((logprobs_TK, tail.to(logprobs_TK.dtype)), dim=-1)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis of normalised log-probabilities."""
    return -(logprobs.exp() * logprobs).sum(-1)
