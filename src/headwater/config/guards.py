"""Thresholds that a training stage is watched with; they change no number a stage computes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from headwater.config.base import Settings

_Share = Annotated[float, Field(gt=0.0, le=1.0)]
_Ratio = Annotated[float, Field(gt=1.0)]


class Guards(Settings):
    """When a training stage is said to go wrong; null switches a guard off.

    A guard speaks once a stage, when its quantity was beyond the threshold for `window_steps`
    steps in a row (no_signal_share: for `no_signal_steps`). "At the start" is the median over
    the stage's first `window_steps` steps.

    entropy_share: entropy of the policy below this share of what it was at the start.
    length_ratio: responses longer than this many times those at the start.
    truncation_rate: more than this share of responses cut at the limit.
    repetition_rise: share of 4-grams that repeat, above the start's by more than this.
    no_signal_share: more than this share of groups with rewards that are all equal.
    sampler_gap_nats: sampler and trainer differ by more than this a token.
    kl_rise_nats: KL to teacher or reference above the start's by more than this a token.
    grad_norm_ratio: gradient norm more than this many times that at the start.
    """

    window_steps: PositiveInt = 5
    no_signal_steps: PositiveInt = 10
    entropy_share: _Share | None = 0.05
    length_ratio: _Ratio | None = 2.0
    truncation_rate: _Share | None = 0.5
    repetition_rise: _Share | None = 0.25
    no_signal_share: _Share | None = 0.95
    sampler_gap_nats: PositiveFloat | None = 0.05
    kl_rise_nats: PositiveFloat | None = 0.5
    grad_norm_ratio: _Ratio | None = 10.0
