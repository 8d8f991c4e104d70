"""KL divergences between teacher and student at each position, and the softmax below them.

forward_kl = KL(teacher || student), mode-covering (arXiv:2605.12483, Eq. 5);
reverse_kl = KL(student || teacher), mode-seeking (arXiv:2605.12483, Eq. 4). Nats, float32.

Functions whose name ends in _ overwrite a chunk's logits [C, V]. They go over it a few rows at a
time, so that what they need besides stays in a processor's cache, and write the gradient by its
formula: no vocabulary-sized tensor is recorded for autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Elements of the rows worked on at a time: 1 MiB of float32.
_BLOCK_ELEMENTS = 1 << 18
#: A logit this far below the largest: its exponential is 0 in every format.
_NO_MASS = -1e4


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


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis of normalised log-probabilities; -inf counts nothing."""
    return _entropy(logprobs.exp(), logprobs)


def _entropy(probabilities: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    least = torch.finfo(logprobs.dtype).min  # times probability 0 it is 0, where -inf is not
    return -(probabilities * logprobs.clamp_min(least)).sum(-1)


# --- softmax in place -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Normaliser:
    """What turns logits into log-probabilities: (logit - shift) - log_sum, both [C].

    In two steps, so that the size of the logits costs no digits.
    """

    shift_C: torch.Tensor
    log_sum_C: torch.Tensor

    @property
    def total_C(self) -> torch.Tensor:
        """Log of the sum of exponentials of all logits, [C]."""
        return self.shift_C + self.log_sum_C

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of some logits of each row, [C] or [C, K]."""
        shape = (-1, *[1] * (logits.dim() - 1))
        return (logits - self.shift_C.view(shape)) - self.log_sum_C.view(shape)


def row_blocks(logits_CV: torch.Tensor) -> Iterator[slice]:
    """Slices of a few rows each, in order, that cover the chunk."""
    step = max(1, _BLOCK_ELEMENTS // logits_CV.shape[1])
    for start in range(0, logits_CV.shape[0], step):
        yield slice(start, start + step)


def softmax_(logits_CV: torch.Tensor) -> Normaliser:
    """Overwrite logits with probabilities."""
    shift_C, largest_C = logits_CV.new_empty(2, logits_CV.shape[0])
    for rows in row_blocks(logits_CV):
        logits = logits_CV[rows]
        probabilities = torch.softmax(logits, dim=-1)
        shift_C[rows] = logits.amax(-1)
        largest_C[rows] = probabilities.amax(-1)
        logits.copy_(probabilities)
    return Normaliser(shift_C, -largest_C.log())


def softmax_with_entropy_(logits_CV: torch.Tensor) -> tuple[Normaliser, torch.Tensor]:
    """Overwrite logits with probabilities; also their entropy [C], nats."""
    shift_C1, sum_C1, along_C1 = logits_CV.new_empty(3, logits_CV.shape[0], 1)
    for rows in row_blocks(logits_CV):
        logits = logits_CV[rows]
        torch.amax(logits, -1, keepdim=True, out=shift_C1[rows])
        # what is clamped has no mass in any format; -inf times that would not be 0
        logits.sub_(shift_C1[rows]).clamp_min_(_NO_MASS)
        mass = logits.exp()
        torch.sum(mass, -1, keepdim=True, out=sum_C1[rows])
        torch.sum(logits.mul_(mass), -1, keepdim=True, out=along_C1[rows])
        torch.mul(mass, sum_C1[rows].reciprocal(), out=logits)
    log_sum_C = sum_C1[:, 0].log()
    return Normaliser(shift_C1[:, 0], log_sum_C), log_sum_C - (along_C1 / sum_C1)[:, 0]


def target_logprobs(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probabilities [C] of the targets under softmax(logits / temperature)."""
    found = [
        torch.log_softmax(logits_CV[rows] / temperature, dim=-1).gather(-1, targets_C[rows, None])
        for rows in row_blocks(logits_CV)
    ]
    return torch.cat(found)[:, 0]


def target_gradient_(
    probabilities_CV: torch.Tensor, targets_C: torch.Tensor, slope_C: torch.Tensor
) -> torch.Tensor:
    """Gradient in the logits of sum f(log p(target)) where slope = f': slope * (onehot - p).

    Overwrites the probabilities.
    """
    slope_C1 = slope_C.to(probabilities_CV.dtype)[:, None]
    return probabilities_CV.mul_(-slope_C1).scatter_add_(-1, targets_C[:, None], slope_C1)


# --- divergences with their gradients -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence of each position, [C], and the student's side of it."""

    kl_C: torch.Tensor
    entropy_C: torch.Tensor
    student: Normaliser
    grad_CV: torch.Tensor | None  # of sum(weights * kl) in the student's logits, if wanted


def full_kl_(
    teacher_CV: torch.Tensor,
    student_CV: torch.Tensor,
    weights_C: torch.Tensor,
    forward_weight: float,
    wants_gradient: bool,
) -> tuple[Divergence, torch.Tensor]:
    """mixed_kl of two rows of logits over the whole vocabulary, and the teacher's entropy [C].

    With student p and teacher q the gradient in the student's logits is p - q for the forward KL
    and p * (log p - log q - KL) for the reverse. If wanted, it overwrites teacher_CV; student_CV
    stays. Outcomes of logit -inf have no mass: one that only the teacher lacks makes the reverse
    KL infinite, one that only the student lacks the forward KL. Two [C, V] tensors, both given.
    """
    kl_C, shift_C, log_sum_C, ours_C, theirs_C = student_CV.new_empty(5, student_CV.shape[0])
    guarded = student_CV.numel() > 0 and bool(
        torch.isneginf(torch.minimum(student_CV.amin(), teacher_CV.amin()))
    )
    for rows in row_blocks(student_CV):
        log_p = torch.log_softmax(student_CV[rows], dim=-1)
        log_q = torch.log_softmax(teacher_CV[rows], dim=-1)
        p, q = log_p.exp(), log_q.exp()
        shift_C[rows], log_sum_C[rows] = student_CV[rows].amax(-1), -log_p.amax(-1)
        ours_C[rows], theirs_C[rows] = _entropy(p, log_p), _entropy(q, log_q)
        kl, grad = kl_C[rows].zero_(), torch.zeros_like(p)
        if forward_weight > 0.0:
            kl.add_((q * _log_ratio(log_q, log_p, q, guarded)).sum(-1), alpha=forward_weight)
            grad.add_(p, alpha=forward_weight).sub_(q, alpha=forward_weight)
        if forward_weight < 1.0:
            log_ratio = _log_ratio(log_p, log_q, p, guarded)
            reverse = (p * log_ratio).sum(-1)
            kl.add_(reverse, alpha=1.0 - forward_weight)
            log_ratio.sub_(reverse[:, None])
            grad.addcmul_(p, log_ratio, value=1.0 - forward_weight)
        if wants_gradient:
            torch.mul(grad, weights_C[rows, None], out=teacher_CV[rows])
    student = Normaliser(shift_C, log_sum_C)
    return Divergence(kl_C, ours_C, student, teacher_CV if wants_gradient else None), theirs_C


def _log_ratio(
    log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor, guarded: bool
) -> torch.Tensor:
    """log p - log q; where -inf can occur, 0 for outcomes without mass under p."""
    ratio = log_p - log_q
    return ratio.masked_fill_(p == 0.0, 0.0) if guarded else ratio


def top_k_kl_(
    teacher_CB: torch.Tensor,
    ids_CK: torch.Tensor,
    student_CV: torch.Tensor,
    weights_C: torch.Tensor,
    forward_weight: float,
    wants_gradient: bool,
) -> Divergence:
    """mixed_kl over K tokens and one bucket for all the rest.

    teacher_CB: log-probabilities of the K tokens and, if K < V, of the bucket (`tail_of`), so
    B = K + 1; ids_CK int64, distinct in a row. Overwrites student_CV, with the gradient if wanted:
    that in the B log-probabilities, g, is autograd's, and with r = softmax over the rest,
    grad = g_k - p_k sum(g) for a kept token and r (g_rest - p_rest sum(g)) for another.
    """
    buckets = student_CV.gather(-1, ids_CK)
    has_rest = ids_CK.shape[1] < student_CV.shape[1]
    if has_rest:
        least = torch.finfo(student_CV.dtype).min  # a row of -inf, an impossible rest, gives NaN
        rest, rest_entropy = softmax_with_entropy_(student_CV.scatter_(-1, ids_CK, least))
        rest_C = rest.total_C.masked_fill(rest.shift_C == least, -torch.inf)
        buckets = torch.cat((buckets, rest_C[:, None]), dim=-1)
    logprobs = torch.log_softmax(buckets, dim=-1)
    p = logprobs.exp()
    shift_C = buckets.amax(-1)
    entropy_C = _entropy(p, logprobs)
    if has_rest:
        entropy_C = entropy_C + p[:, -1] * rest_entropy
    with torch.set_grad_enabled(wants_gradient):
        ours = logprobs.requires_grad_(wants_gradient)
        kl_C = mixed_kl(teacher_CB, ours, forward_weight)
        weighted = (weights_C * kl_C).sum()
    if wants_gradient:
        (g,) = torch.autograd.grad(weighted, ours)
        slopes = g - p * g.sum(-1, keepdim=True)
        if has_rest:
            student_CV.mul_(slopes[:, -1:])
        student_CV.scatter_(-1, ids_CK, slopes[:, : ids_CK.shape[1]])
    student = Normaliser(shift_C, torch.logsumexp(buckets - shift_C[:, None], dim=-1))
    return Divergence(kl_C.detach(), entropy_C, student, student_CV if wants_gradient else None)


def distance(
    teacher_CV: torch.Tensor, student_CV: torch.Tensor, top: int
) -> dict[str, torch.Tensor]:
    """How two rows of logits differ, each measure [C], in nats or as a share; no gradient.

    forward_kl KL(teacher || student), reverse_kl KL(student || teacher), entropy (the student's),
    teacher_entropy; top_overlap: share of the student's `top` likeliest tokens that are among the
    teacher's; overlap_mass: the student's probability of those.
    """
    log_p, log_q = torch.log_softmax(student_CV, dim=-1), torch.log_softmax(teacher_CV, dim=-1)
    k = min(top, student_CV.shape[-1])
    ours, theirs = log_p.topk(k, dim=-1), log_q.topk(k, dim=-1)
    shared = (ours.indices[:, :, None] == theirs.indices[:, None, :]).any(-1)
    return {
        "forward_kl": forward_kl(log_q, log_p),
        "reverse_kl": reverse_kl(log_q, log_p),
        "entropy": entropy(log_p),
        "teacher_entropy": entropy(log_q),
        "top_overlap": shared.to(log_p.dtype).mean(-1),
        "overlap_mass": (ours.values.exp() * shared).sum(-1),
    }


# --- top-k ----------------------------------------------------------------------------------------

#: The least mass a tail is taken to have: what float32 log-probabilities can tell from none.
_LEAST_TAIL = 1e-7


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
    """Append the log of the mass that K log-probabilities leave over: [T, K + 1].

    At K = V nothing is left over and nothing is appended. A teacher that is sure leaves less than
    float32 can tell from nothing; the bucket then holds 1e-7, so that a reverse KL from a student
    who is less sure stays finite.
    """
    if logprobs_TK.shape[-1] == vocab_size:
        return logprobs_TK
    left = 1.0 - logprobs_TK.double().exp().sum(-1, keepdim=True)
    tail = left.clamp_min(_LEAST_TAIL).log()
    return torch.cat((logprobs_TK, tail.to(logprobs_TK.dtype)), dim=-1)
