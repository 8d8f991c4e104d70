"""Watches the metrics of a training stage and says in words when it goes wrong.

Pure: what is found follows from the settings and the metrics of the steps alone, so that a
resumed stage, which reads the earlier steps back, finds what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from headwater.config.guards import Guards
from headwater.stages.alerts import Alert


@dataclass(frozen=True, slots=True)
class _Guard:
    """A threshold on a metric, and its words.

    setting: its name in `Guards`. bound(threshold, start): the value beyond which the metric is
    wrong. relative: needs the metric's value at the start. below: wrong is less than the bound.
    """

    setting: str
    quantity: str
    bound: Callable[[float, float], float]
    seen: str
    causes: str
    cures: str
    relative: bool = False
    below: bool = False
    window: str = "window_steps"

    def beyond(self, value: float, bound: float) -> bool:
        return value < bound if self.below else value > bound


def _kl_guard(quantity: str, other: str, cures: str) -> _Guard:
    return _Guard(
        "kl_rise_nats",
        quantity,
        lambda threshold, start: start + threshold,
        f"KL to the {other} is {{value:.3f}} nats a token, from {{start:.3f}} at the start",
        "steps too large for this model; responses so long that their ends are strange to both",
        cures,
        relative=True,
    )


_GUARDS: tuple[_Guard, ...] = (
    _Guard(
        "entropy_share",
        "entropy",
        lambda threshold, start: threshold * start,
        "entropy collapsed to {value:.4f} nats a token, from {start:.3f} at the start",
        "a learning rate that is too high; problems that all reward one answer; too many updates "
        "on a batch",
        "a lower lr, a KL penalty (grpo.kl), fewer steps, or a larger pool",
        relative=True,
        below=True,
    ),
    _Guard(
        "length_ratio",
        "response_tokens",
        lambda threshold, start: threshold * start,
        "responses grew to {value:.0f} tokens, from {start:.0f} at the start",
        "length is rewarded, or not punished when it is wrong; the model loops",
        "reading some with `headwater samples`, normalization: constant, or fewer "
        "sampling.max_new_tokens",
        relative=True,
    ),
    _Guard(
        "truncation_rate",
        "truncation_rate",
        lambda threshold, start: threshold,
        "{value:.0%} of responses are cut at the limit",
        "a limit below what answers need; a base that does not end its answers; loops",
        "more sampling.max_new_tokens, a stage of sft before, or `headwater samples` to see why",
    ),
    _Guard(
        "repetition_rise",
        "repetition",
        lambda threshold, start: start + threshold,
        "{value:.0%} of 4-grams repeat earlier ones, from {start:.0%} at the start",
        "the model loops: steps too large, or responses longer than it was ever taught",
        "a lower lr, fewer sampling.max_new_tokens, or a KL penalty",
        relative=True,
    ),
    _Guard(
        "no_signal_share",
        "zero_variance_share",
        lambda threshold, start: threshold,
        "{value:.0%} of groups have rewards that are all equal: they teach nothing",
        "problems far too hard or far too easy for this model; a verifier that rejects the form "
        "of the answers",
        "problems of another level, a larger group_size, dynamic_sampling, or `headwater verify` "
        "on some responses; where the pass rate is high, fewer steps",
        window="no_signal_steps",
    ),
    _Guard(
        "sampler_gap_nats",
        "sampler_gap",
        lambda threshold, start: threshold,
        "sampler and trainer differ by {value:.3f} nats a token",
        "bfloat16 on weights that need more; top_p or top_k below their neutral values",
        "compute.precision: float32, importance_cap left on, and sampling.top_p: 1",
    ),
    _kl_guard(
        "kl", "teacher", "a lower lr, kl: mixed, a warmup before, or fewer sampling.max_new_tokens"
    ),
    _kl_guard("reference_kl", "reference", "a lower lr, or a larger grpo.kl.coefficient"),
    _Guard(
        "grad_norm_ratio",
        "grad_norm",
        lambda threshold, start: threshold * start,
        "the gradient's norm is {value:.3g}, from {start:.3g} at the start",
        "a learning rate that is too high; rare tokens with very large weights",
        "a lower lr, more warmup_steps, a smaller grad_clip, or importance_cap left on",
        relative=True,
    ),
)


@dataclass(slots=True)
class _Seen:
    """What a guard keeps of the past: first values, and steps in a row beyond the bound."""

    first: list[float] = field(default_factory=list)
    streak: int = 0
    spoke: bool = False


class Watcher:
    """Takes the metrics of one step after another and returns the alerts they raise.

    Each guard speaks once a stage, after enough steps in a row beyond its threshold; a single
    step within it starts the count again. Steps that do not log a quantity do not count.
    """

    def __init__(self, settings: Guards, total_steps: int) -> None:
        self._settings, self._total = settings, total_steps
        self._active = [
            (guard, _Seen()) for guard in _GUARDS if getattr(settings, guard.setting) is not None
        ]

    def watch(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Alerts of a step (from 0, as in metrics.jsonl); give every step once, in order."""
        found = (self._watch(guard, seen, step, metrics) for guard, seen in self._active)
        return [alert for alert in found if alert is not None]

    def _watch(
        self, guard: _Guard, seen: _Seen, step: int, metrics: Mapping[str, float]
    ) -> Alert | None:
        value = metrics.get(guard.quantity)
        if value is None or seen.spoke or (guard.quantity == "grad_norm" and value == 0.0):
            return None  # a norm of zero is an update that had nothing to learn from
        if guard.relative and len(seen.first) < self._settings.window_steps:
            seen.first.append(value)
            return None
        start = median(seen.first) if guard.relative else 0.0
        threshold = float(getattr(self._settings, guard.setting))
        bound = guard.bound(threshold, start)
        seen.streak = seen.streak + 1 if guard.beyond(value, bound) else 0
        needed = int(getattr(self._settings, guard.window))
        if seen.streak < needed:
            return None
        seen.spoke = True
        said = guard.seen.format(value=value, start=start)
        side = "below" if guard.below else "above"
        return Alert(
            guard=guard.setting,
            quantity=guard.quantity,
            step=step + 1,
            value=value,
            threshold=bound,
            seen=f"step {step + 1} of {self._total}: {said}, {needed} steps in a row {side} "
            f"{bound:.4g} (guards.{guard.setting}: {threshold:g})",
            causes=guard.causes,
            cures=guard.cures,
        )
