"""Drawing tokens from logits, with the log-probability of what was drawn.

B rows of the batch, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch

from headwater.engine.fused_layers import widened
from headwater.engine.kernel_calls import kernels_of

#: A large vocabulary is searched in two steps: which segment of so many tokens, which token.
_SEGMENT_TOKENS = 256


class Draw(Protocol):
    """What a draw needs of `SamplerSettings`."""

    @property
    def temperature(self) -> float: ...
    @property
    def forbid_end(self) -> bool: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...


def draw_tokens(
    logits_BV: torch.Tensor,
    uniforms_B: torch.Tensor,
    settings: Draw,
    ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF draw: the first token whose cumulative probability exceeds u.

    logits_BV, in any format, is overwritten. Returns tokens int64 [B] and their log-probabilities
    at the sampling temperature, among the tokens that top_k and top_p keep, [B] in at least
    float32; at temperature 0 the likeliest token is certain.
    """
    kernels = kernels_of(logits_BV)
    all_kept = settings.top_k is None and settings.top_p == 1.0
    if kernels is not None and all_kept and settings.temperature > 0.0:
        forbidden = ends if settings.forbid_end else ends[:0]
        return kernels.draw(logits_BV.contiguous(), uniforms_B, settings.temperature, forbidden)
    logits_BV = widened(logits_BV)
    if settings.forbid_end:
        logits_BV[:, ends] = -torch.inf
    if settings.temperature == 0.0:
        token = logits_BV.argmax(-1)
        return token, torch.zeros_like(token, dtype=logits_BV.dtype)
    if settings.temperature != 1.0:
        logits_BV.div_(settings.temperature)
    if settings.top_k is not None or settings.top_p < 1.0:
        keep_likeliest(logits_BV, settings.top_p, settings.top_k)
    mass = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()
    sums = _segment_sums(mass)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = uniforms_B[:, None] * total
    token = _first_above(cumulative, threshold)
    if sums is not mass:
        size = _SEGMENT_TOKENS
        threshold = threshold - (cumulative - sums).gather(1, token)
        inside = token * size + torch.arange(size, device=mass.device)
        beyond = inside >= mass.shape[1]
        there = mass.gather(1, inside.clamp_max(mass.shape[1] - 1)).masked_fill_(beyond, 0.0)
        token = token * size + _first_above(there.cumsum(-1), threshold)
        token.clamp_max_(mass.shape[1] - 1)
    logprobs = mass.gather(1, token).log_().sub_(total.log())
    return token[:, 0], logprobs[:, 0]


def keep_likeliest(logits_BV: torch.Tensor, top_p: float, top_k: int | None) -> None:
    """Set the logits of all other tokens to -inf, in place: first all but the `top_k` likeliest,
    then all but the fewest of these that together have probability `top_p` or more. Tokens as
    likely as the last one kept stay."""
    if top_k is not None and top_k < logits_BV.shape[1]:
        least = logits_BV.topk(top_k, -1).values[:, -1:]
        logits_BV.masked_fill_(logits_BV < least, -torch.inf)
    if top_p < 1.0:
        falling = logits_BV.sort(-1, descending=True).values
        mass = falling.float().softmax(-1)
        kept = mass.cumsum(-1) - mass < top_p  # what comes before has not reached it
        least = falling.gather(1, kept.sum(-1, keepdim=True) - 1)
        logits_BV.masked_fill_(logits_BV < least, -torch.inf)


def _segment_sums(mass_BV: torch.Tensor) -> torch.Tensor:
    """Sums over segments of the vocabulary; a small one is not divided."""
    vocab = mass_BV.shape[1]
    if vocab <= 2 * _SEGMENT_TOKENS:
        return mass_BV
    whole = vocab - vocab % _SEGMENT_TOKENS
    sums = mass_BV[:, :whole].unflatten(1, (-1, _SEGMENT_TOKENS)).sum(-1)
    if whole == vocab:
        return sums
    return torch.cat((sums, mass_BV[:, whole:].sum(-1, keepdim=True)), 1)


def _first_above(cumulative: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """First place whose cumulative mass exceeds the threshold, [B, 1]: one that has mass itself.

    A threshold that rounding carried out of the range is taken to its nearest end.
    """
    last = cumulative[:, -1:]
    threshold = torch.minimum(threshold, torch.nextafter(last, torch.zeros_like(last)))
    found = torch.searchsorted(cumulative, threshold.clamp_min_(0.0), right=True)
    return found.clamp_max_(cumulative.shape[1] - 1)  # reached by logits that are not numbers only
