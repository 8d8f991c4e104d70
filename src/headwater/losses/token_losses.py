"""Chunk losses the stages train with: each returns a sum over tokens, never a mean.

Every builder takes whole-batch tensors [T] and returns a function of (logits of a chunk, its
slice), to be run by `losses.chunked_head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headwater.losses import grpo
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.divergences import entropy, mixed_kl, reverse_kl, tail_of, with_tail
from headwater.types import FullTargets, LossSums, SampledTargets, TeacherTargets, TopKTargets


def cross_entropy(targets_T: torch.Tensor, weights_T: torch.Tensor) -> ChunkLoss:
    """-log pi(target), weighted. targets int64 [T], weights float32 [T]."""

    def loss(logits_CV: torch.Tensor, part: slice) -> LossSums:
        logprobs = torch.log_softmax(logits_CV, dim=-1)
        picked = logprobs.gather(-1, targets_T[part, None])[:, 0]
        weights = weights_T[part]
        hits = (logits_CV.detach().argmax(-1) == targets_T[part]).sum()
        count = float(picked.shape[0])
        return LossSums(
            -(weights * picked).sum(),
            float(weights.sum()),
            {"nll": (float(-picked.detach().sum()), count), "token_accuracy": (float(hits), count)},
        )

    return loss


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Per-token inputs of the GRPO loss, all float32 [T] but targets (int64)."""

    targets_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None = None  # None: this very forward is the old policy
    reference_logprobs_T: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Clipping, importance cap and KL penalty of the GRPO loss."""

    clip_low: float
    clip_high: float
    importance_cap: float | None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    reference: FullTargets | None = None  # for the exact estimator
    temperature: float = 1.0  # of policy and reference alike


def policy_loss(
    terms: PolicyTerms, settings: PolicySettings, remember: Callable[[torch.Tensor, slice], None]
) -> ChunkLoss:
    """Clipped surrogate with truncated importance weights and an optional KL penalty.

    `remember(logprobs_C, part)` receives the current log-probabilities of the targets.
    """

    def loss(logits_CV: torch.Tensor, part: slice) -> LossSums:
        all_logprobs = torch.log_softmax(logits_CV, dim=-1)
        logprobs = all_logprobs.gather(-1, terms.targets_T[part, None])[:, 0]
        current = logprobs.detach()
        remember(current, part)
        old = current if terms.old_logprobs_T is None else terms.old_logprobs_T[part]
        advantages, weights = terms.advantages_T[part], terms.weights_T[part]
        correction = grpo.importance_weights(
            old, terms.sampler_logprobs_T[part], settings.importance_cap
        )
        token_loss = correction * grpo.clipped_surrogate(
            logprobs, old, advantages, settings.clip_low, settings.clip_high
        )
        count = float(current.shape[0])
        gap = (old - terms.sampler_logprobs_T[part]).abs()
        ratio = (current - old).exp()
        clipped = ((ratio > 1 + settings.clip_high) & (advantages > 0)) | (
            (ratio < 1 - settings.clip_low) & (advantages < 0)
        )
        metrics = {
            "entropy": (float(entropy(all_logprobs.detach()).sum()), count),
            "sampler_gap": (float(gap.sum()), count),
            "clipped_share": (float(clipped.sum()), count),
        }
        if settings.kl_coefficient > 0:
            penalty = _penalty(settings, terms, all_logprobs, logprobs, part)
            token_loss = token_loss + settings.kl_coefficient * penalty
            metrics["reference_kl"] = (float(penalty.detach().sum()), count)
        return LossSums((weights * token_loss).sum(), float(weights.sum()), metrics)

    return loss


def _penalty(
    settings: PolicySettings,
    terms: PolicyTerms,
    all_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    part: slice,
) -> torch.Tensor:
    if settings.kl_estimator == "exact":
        assert settings.reference is not None
        theirs = _teacher_logprobs(
            settings.reference, part, settings.temperature, all_logprobs.shape[1]
        )
        return reverse_kl(theirs, all_logprobs)
    assert terms.reference_logprobs_T is not None
    estimator = grpo.kl_penalty_k2 if settings.kl_estimator == "k2" else grpo.kl_penalty_k3
    return estimator(logprobs, terms.reference_logprobs_T[part])


def _teacher_logprobs(
    targets: FullTargets, part: slice, temperature: float = 1.0, vocab: int | None = None
) -> torch.Tensor:
    with torch.no_grad():
        logits = targets.hidden_TH[part] @ targets.head_VH[:vocab].T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.log_softmax(logits / temperature, dim=-1)


def distillation_loss(
    targets_T: torch.Tensor,
    weights_T: torch.Tensor,
    teacher: TeacherTargets,
    *,
    forward_weight: float,
    teacher_temperature: float = 1.0,
    sampler_logprobs_T: torch.Tensor | None = None,
    sampler_temperature: float = 1.0,
    importance_cap: float | None = None,
) -> ChunkLoss:
    """KL to the teacher at every position, or the policy gradient of its sampled estimate.

    forward_weight 1: forward KL (Eq. 5); 0: reverse KL (Eq. 4); between: mixed. With sampled
    targets the loss is -w (log pi_T - log pi).detach() log pi, whose gradient is that of the
    reverse KL in expectation; k1 itself has no teacher gradient. The student stands at
    temperature 1; sampler_logprobs_T include `sampler_temperature`, and so does the gap.
    """

    def loss(logits_CV: torch.Tensor, part: slice) -> LossSums:
        weights = weights_T[part]
        count = float(logits_CV.shape[0])
        logprobs = torch.log_softmax(logits_CV, dim=-1)
        metrics = {"entropy": (float(entropy(logprobs.detach()).sum()), count)}
        if sampler_logprobs_T is not None:
            metrics["sampler_gap"] = (gap(logits_CV.detach(), logprobs.detach(), part), count)
        if isinstance(teacher, FullTargets):
            theirs = _teacher_logprobs(teacher, part, teacher_temperature, logits_CV.shape[1])
            divergence = mixed_kl(theirs, logprobs, forward_weight)
            metrics |= _overlap(theirs, logprobs.detach())
            metrics["teacher_entropy"] = (float(entropy(theirs).sum()), count)
        elif isinstance(teacher, TopKTargets):
            ours = with_tail(logits_CV, teacher.ids_TK[part])
            theirs = tail_of(teacher.logprobs_TK[part], logits_CV.shape[1])
            divergence = mixed_kl(theirs, ours, forward_weight)
        else:
            return _sampled(logprobs, part, teacher, weights, metrics)
        metrics["kl"] = (float(divergence.detach().sum()), count)
        return LossSums((weights * divergence).sum(), float(weights.sum()), metrics)

    def gap(logits_CV: torch.Tensor, logprobs: torch.Tensor, part: slice) -> float:
        assert sampler_logprobs_T is not None
        if sampler_temperature != 1.0:
            logprobs = torch.log_softmax(logits_CV / sampler_temperature, dim=-1)
        picked = logprobs.gather(-1, targets_T[part, None])[:, 0]
        return float((picked - sampler_logprobs_T[part]).abs().sum())

    def _sampled(
        logprobs: torch.Tensor,
        part: slice,
        sampled: SampledTargets,
        weights: torch.Tensor,
        metrics: dict[str, tuple[float, float]],
    ) -> LossSums:
        picked = logprobs.gather(-1, targets_T[part, None])[:, 0]
        log_ratio = sampled.logprobs_T[part] - picked.detach()
        correction = torch.ones_like(log_ratio)
        if sampler_logprobs_T is not None:
            correction = grpo.importance_weights(
                picked.detach(), sampler_logprobs_T[part], importance_cap
            )
        metrics["kl"] = (float(-log_ratio.sum()), float(log_ratio.shape[0]))
        value = -(weights * correction * log_ratio * picked).sum()
        return LossSums(value, float(weights.sum()), metrics)

    return loss


def _overlap(
    teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """Share of the student's top-16 tokens among the teacher's, and student mass on both."""
    k = min(16, max(2, teacher_logprobs.shape[-1] // 8))
    rows = teacher_logprobs.shape[0]
    step = max(1, rows // 64)  # a sample of positions is enough to watch
    theirs = teacher_logprobs[::step].topk(k, dim=-1).indices
    ours = student_logprobs[::step].topk(k, dim=-1)
    shared = (ours.indices[:, :, None] == theirs[:, None, :]).any(-1)
    mass = (ours.values.exp() * shared).sum(-1)
    count = float(shared.shape[0])
    return {
        "top_overlap": (float(shared.float().mean(-1).sum()), count),
        "overlap_mass": (float(mass.sum()), count),
    }
