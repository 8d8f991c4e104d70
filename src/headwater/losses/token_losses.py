"""Chunk losses the stages train with: each returns a sum over tokens, never a mean.

Every builder takes whole-batch tensors [T] and returns a `ChunkLoss`, to be run by
`losses.chunked_head`. What a loss says of a target's log-probability is differentiated by autograd
on [C] numbers; from there to the logits [C, V] the gradient is written by formula, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headwater.losses import grpo
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.divergences import (
    Divergence,
    full_kl_,
    softmax_,
    softmax_with_entropy_,
    tail_of,
    target_gradient_,
    target_logprobs,
    top_k_kl_,
)
from headwater.types import FullTargets, LossSums, SampledTargets, TeacherTargets, TopKTargets

#: Name -> (sum, count).
Metrics = dict[str, tuple[float, float]]


def cross_entropy(targets_T: torch.Tensor, weights_T: torch.Tensor) -> ChunkLoss:
    """-log pi(target), weighted. targets int64 [T], weights float32 [T]."""

    def loss(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        targets, weights = targets_T[part], weights_T[part]
        hits = (logits_CV.max(-1).indices == targets).sum()
        target_logits = _at(logits_CV, targets)
        logprobs = softmax_(logits_CV).logprobs(target_logits)
        count = float(logprobs.shape[0])
        sums = LossSums(
            -(weights * logprobs).sum(),
            float(weights.sum()),
            {"nll": (float(-logprobs.sum()), count), "token_accuracy": (float(hits), count)},
        )
        return sums, target_gradient_(logits_CV, targets, -weights) if wants_gradient else None

    return loss


def _at(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return logits_CV.gather(-1, targets_C[:, None])[:, 0]


def _value_and_slope(
    formula: Callable[[torch.Tensor], torch.Tensor], logprobs_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of `formula(logprobs)` and its derivative in each of them, [C]."""
    with torch.enable_grad():
        leaf = logprobs_C.detach().requires_grad_(True)
        value = formula(leaf).sum()
        (slope_C,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope_C


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

    def loss(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        targets, weights = terms.targets_T[part], terms.weights_T[part]
        target_logits = _at(logits_CV, targets)
        exact = _exact_penalty(settings, logits_CV, part, weights, wants_gradient)
        normaliser, entropy_C = softmax_with_entropy_(logits_CV)
        logprobs = normaliser.logprobs(target_logits)
        remember(logprobs, part)
        old = logprobs if terms.old_logprobs_T is None else terms.old_logprobs_T[part]

        def weighted(logprobs_C: torch.Tensor) -> torch.Tensor:
            return weights * _policy_tokens(terms, settings, part, logprobs_C, old)

        grad_CV = None
        if wants_gradient:
            value, slope = _value_and_slope(weighted, logprobs)
            grad_CV = target_gradient_(logits_CV, targets, slope)
        else:
            value = weighted(logprobs).sum()
        count = float(logprobs.shape[0])
        metrics: Metrics = {"entropy": (float(entropy_C.sum()), count)}
        metrics |= _policy_metrics(terms, settings, part, logprobs, old)
        if exact is not None:
            value = value + settings.kl_coefficient * (weights * exact.kl_C).sum()
            metrics["reference_kl"] = (float(exact.kl_C.sum()), count)
            if grad_CV is not None and exact.grad_CV is not None:
                grad_CV.add_(exact.grad_CV)
        return LossSums(value, float(weights.sum()), metrics), grad_CV

    return loss


def _policy_tokens(
    terms: PolicyTerms,
    settings: PolicySettings,
    part: slice,
    logprobs_C: torch.Tensor,
    old_C: torch.Tensor,
) -> torch.Tensor:
    """The loss of each token [C] as a function of its log-probability; exact penalty apart."""
    correction = grpo.importance_weights(
        old_C, terms.sampler_logprobs_T[part], settings.importance_cap
    )
    token_loss = correction * grpo.clipped_surrogate(
        logprobs_C, old_C, terms.advantages_T[part], settings.clip_low, settings.clip_high
    )
    penalty = _sampled_penalty(terms, settings, part, logprobs_C)
    return token_loss if penalty is None else token_loss + settings.kl_coefficient * penalty


def _sampled_penalty(
    terms: PolicyTerms, settings: PolicySettings, part: slice, logprobs_C: torch.Tensor
) -> torch.Tensor | None:
    """k2 or k3 of each token [C], where one of them is the penalty."""
    if settings.kl_coefficient <= 0 or settings.kl_estimator == "exact":
        return None
    assert terms.reference_logprobs_T is not None
    estimator = grpo.kl_penalty_k2 if settings.kl_estimator == "k2" else grpo.kl_penalty_k3
    return estimator(logprobs_C, terms.reference_logprobs_T[part])


def _exact_penalty(
    settings: PolicySettings,
    logits_CV: torch.Tensor,
    part: slice,
    weights_C: torch.Tensor,
    wants_gradient: bool,
) -> Divergence | None:
    """KL(policy || reference), where it is the penalty; gradient times coefficient and weights."""
    if settings.kl_coefficient <= 0 or settings.kl_estimator != "exact":
        return None
    assert settings.reference is not None
    theirs = _teacher_logits(settings.reference, part, settings.temperature, logits_CV.shape[1])
    scaled = settings.kl_coefficient * weights_C
    return full_kl_(theirs, logits_CV, scaled, 0.0, wants_gradient)[0]


def _policy_metrics(
    terms: PolicyTerms,
    settings: PolicySettings,
    part: slice,
    logprobs_C: torch.Tensor,
    old_C: torch.Tensor,
) -> Metrics:
    count = float(logprobs_C.shape[0])
    advantages, sampler = terms.advantages_T[part], terms.sampler_logprobs_T[part]
    ratio = (logprobs_C - old_C).exp()
    clipped = ((ratio > 1 + settings.clip_high) & (advantages > 0)) | (
        (ratio < 1 - settings.clip_low) & (advantages < 0)
    )
    metrics: Metrics = {
        "sampler_gap": (float((old_C - sampler).abs().sum()), count),
        "clipped_share": (float(clipped.sum()), count),
    }
    penalty = _sampled_penalty(terms, settings, part, logprobs_C)
    if penalty is not None:
        metrics["reference_kl"] = (float(penalty.sum()), count)
    if settings.importance_cap is not None:
        correction = grpo.importance_weights(old_C, sampler, settings.importance_cap)
        metrics |= _importance_metrics(correction, settings.importance_cap)
    return metrics


def _importance_metrics(weights_C: torch.Tensor, cap: float) -> Metrics:
    """The truncated importance weights, and the share of tokens whose weight is the cap."""
    count = float(weights_C.shape[0])
    return {
        "importance_weight": (float(weights_C.sum()), count),
        "importance_capped_share": (float((weights_C >= cap).sum()), count),
    }


def _teacher_logits(
    teacher: FullTargets, part: slice, temperature: float, vocab: int
) -> torch.Tensor:
    """The teacher's logits of a chunk over the student's vocabulary, [C, V], float32 or better."""
    logits = teacher.hidden_TH[part] @ teacher.head_VH[:vocab].T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits.div_(temperature)


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
    return _Distillation(
        targets_T,
        weights_T,
        teacher,
        forward_weight,
        teacher_temperature,
        sampler_logprobs_T,
        sampler_temperature,
        importance_cap,
    )


@dataclass(frozen=True, slots=True)
class _Distillation:
    """The chunk loss that `distillation_loss` describes."""

    targets_T: torch.Tensor
    weights_T: torch.Tensor
    teacher: TeacherTargets
    forward_weight: float
    teacher_temperature: float
    sampler_logprobs_T: torch.Tensor | None
    sampler_temperature: float
    importance_cap: float | None

    def __call__(
        self, logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        targets, weights = self.targets_T[part], self.weights_T[part]
        target_logits = _at(logits_CV, targets)
        as_sampled = None  # log-probabilities where the sampler had a temperature of its own
        if self.sampler_logprobs_T is not None and self.sampler_temperature != 1.0:
            as_sampled = target_logprobs(logits_CV, targets, self.sampler_temperature)
        metrics: Metrics = {}
        if isinstance(self.teacher, FullTargets):
            found, metrics = self._full(self.teacher, logits_CV, part, wants_gradient)
            value = (weights * found.kl_C).sum()
        elif isinstance(self.teacher, TopKTargets):
            theirs = tail_of(self.teacher.logprobs_TK[part], logits_CV.shape[1])
            ids = self.teacher.ids_TK[part]
            found = top_k_kl_(theirs, ids, logits_CV, weights, self.forward_weight, wants_gradient)
            value = (weights * found.kl_C).sum()
        else:
            found, value, metrics = self._sampled(self.teacher, logits_CV, part, wants_gradient)
        count = float(targets.shape[0])
        metrics["entropy"] = (float(found.entropy_C.sum()), count)
        metrics["kl"] = (float(found.kl_C.sum()), count)
        if self.sampler_logprobs_T is not None:
            ours = found.student.logprobs(target_logits) if as_sampled is None else as_sampled
            gap = (ours - self.sampler_logprobs_T[part]).abs()
            metrics["sampler_gap"] = (float(gap.sum()), count)
        return LossSums(value, float(weights.sum()), metrics), found.grad_CV

    def _full(
        self, teacher: FullTargets, logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[Divergence, Metrics]:
        theirs = _teacher_logits(teacher, part, self.teacher_temperature, logits_CV.shape[1])
        their_ids = _watched_top(theirs)[1]
        found, teacher_entropy_C = full_kl_(
            theirs, logits_CV, self.weights_T[part], self.forward_weight, wants_gradient
        )
        metrics = _overlap(their_ids, logits_CV, found)
        metrics["teacher_entropy"] = (float(teacher_entropy_C.sum()), float(logits_CV.shape[0]))
        return found, metrics

    def _sampled(
        self, teacher: SampledTargets, logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[Divergence, torch.Tensor, Metrics]:
        """Policy gradient with log pi_T - log pi, held fixed, as advantage: minus the kl here."""
        targets, sampler, cap = self.targets_T[part], self.sampler_logprobs_T, self.importance_cap
        target_logits = _at(logits_CV, targets)
        student, entropy_C = softmax_with_entropy_(logits_CV)
        logprobs = student.logprobs(target_logits)
        log_ratio = teacher.logprobs_T[part] - logprobs
        slope = -self.weights_T[part] * log_ratio
        metrics: Metrics = {}
        if sampler is not None and cap is not None:
            correction = grpo.importance_weights(logprobs, sampler[part], cap)
            metrics = _importance_metrics(correction, cap)
            slope = slope * correction
        grad_CV = target_gradient_(logits_CV, targets, slope) if wants_gradient else None
        found = Divergence(-log_ratio, entropy_C, student, grad_CV)
        return found, (slope * logprobs).sum(), metrics


def _watched_top(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 largest logits of a sample of positions, which is enough to watch; values and ids."""
    k = min(16, max(2, logits_CV.shape[-1] // 8))
    top = _watched(logits_CV).topk(k, dim=-1)
    return top.values, top.indices


def _watched(rows: torch.Tensor) -> torch.Tensor:
    return rows[:: max(1, rows.shape[0] // 64)]


def _overlap(their_ids: torch.Tensor, logits_CV: torch.Tensor, found: Divergence) -> Metrics:
    """Share of the student's top-16 tokens among the teacher's, and student mass on both."""
    our_logits, our_ids = _watched_top(logits_CV)
    shared = (our_ids[:, :, None] == their_ids[:, None, :]).any(-1)
    mass = (our_logits - _watched(found.student.total_C)[:, None]).exp() * shared
    count = float(shared.shape[0])
    return {
        "top_overlap": (float(shared.float().mean(-1).sum()), count),
        "overlap_mass": (float(mass.sum()), count),
    }
