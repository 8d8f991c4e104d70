"""What to watch while models train: truncation, repetition, groups without signal, the gap.

Each quantity has a threshold beyond which runs are known to go wrong; passing it is said in
words, with what to try.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.report.curves import METRICS_FILE, read_metrics
from headwater.report.results import AlertRow, DynamicsRow, StageRow

#: Last part of a stage that its means are taken over.
_LAST_SHARE = 0.25
_WATCHED = (
    "pass_rate",
    "zero_variance_share",
    "truncation_rate",
    "repetition",
    "response_tokens",
    "entropy",
    "sampler_gap",
    "grad_norm",
)


@dataclass(frozen=True, slots=True)
class Threshold:
    """An alarm on the mean of a quantity over a stage's last quarter, and its words.

    when: whether (mean, mean at the start) is beyond it.
    """

    quantity: str
    when: Callable[[float, float], bool]
    words: str


THRESHOLDS: tuple[Threshold, ...] = (
    Threshold(
        "truncation_rate",
        lambda now, start: now > 0.2,
        "{now:.0%} of responses are cut at the limit: raise sampling.max_new_tokens, or look for "
        "loops with `headwater samples`",
    ),
    Threshold(
        "repetition",
        lambda now, start: now > 0.3 and now > 1.5 * start,
        "{now:.0%} of 4-grams repeat earlier ones, from {start:.0%}: the model loops; lower the "
        "learning rate or shorten responses",
    ),
    Threshold(
        "zero_variance_share",
        lambda now, start: now > 0.8,
        "{now:.0%} of groups have no reward signal: with a low pass rate use easier problems, or "
        "sft first; with a high one harder problems, or stop, for nothing is left to learn here; "
        "in between larger groups, or dynamic_sampling",
    ),
    Threshold(
        "sampler_gap",
        lambda now, start: now > 0.05,
        "sampler and trainer differ by {now:.3f} nats a token: use precision: float32, or keep "
        "importance_cap on",
    ),
    Threshold(
        "entropy",
        lambda now, start: start > 0.05 and now < 0.05 * start,
        "entropy fell from {start:.3f} to {now:.3f} nats: the policy has collapsed; lower the "
        "learning rate or add a KL penalty",
    ),
    Threshold(
        "response_tokens",
        lambda now, start: now > 2.0 * start and start > 0.0,
        "responses grew from {start:.0f} to {now:.0f} tokens: check that length is not what is "
        "rewarded",
    ),
)


def dynamics_of(
    stages: Sequence[StageRow], run_dir: Path, alerts: Collection[AlertRow] = ()
) -> tuple[DynamicsRow, ...]:
    """One row for each training stage that logged something, its seeds together.

    alerts: what guards said while the stages ran, which is not said again. Raises InputError for
    a metrics file that cannot be read.
    """
    groups: dict[tuple[str, str, str | None, tuple[str, ...]], list[StageRow]] = {}
    for stage in stages:
        if stage.kind not in ("evaluate", "probe", "source", "pretrain"):
            key = stage.kind, stage.model, stage.pool, stage.used_by
            groups.setdefault(key, []).append(stage)
    rows = (_row(group, run_dir, alerts) for group in groups.values())
    return tuple(row for row in rows if row is not None)


def _row(
    group: Sequence[StageRow], run_dir: Path, alerts: Collection[AlertRow]
) -> DynamicsRow | None:
    paths = [run_dir / "artifacts" / stage.fingerprint / METRICS_FILE for stage in group]
    logs = [read_metrics(path) for path in paths if path.is_file()]
    logs = [log for log in logs if log]
    if not logs:
        return None
    first = group[0]
    ends = {name: _ends(name, logs) for name in _WATCHED}
    members = {stage.fingerprint for stage in group}
    said = {alert.quantity for alert in alerts if alert.stage in members}
    means = {name: None if found is None else found[0] for name, found in ends.items()}
    return DynamicsRow(
        kind=first.kind,
        model=first.model,
        pool=first.pool,
        used_by=first.used_by,
        alarms=alarms(
            {name: found for name, found in ends.items() if found is not None and name not in said}
        ),
        artifacts=tuple(stage.fingerprint for stage in group),
        **means,
    )


def alarms(ends: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """The words of every threshold passed; `ends` has (mean at the end, mean at the start)."""
    return tuple(
        one.words.format(now=ends[one.quantity][0], start=ends[one.quantity][1])
        for one in THRESHOLDS
        if one.quantity in ends and one.when(*ends[one.quantity])
    )


def _ends(
    name: str, logs: Sequence[Mapping[int, Mapping[str, float]]]
) -> tuple[float, float] | None:
    """(mean over the last quarter, mean over the first) of the steps, averaged over seeds.

    A sampler's gap is that of steps with a forward pass of their own.
    """
    found = []
    for log in logs:
        steps = [log[step] for step in sorted(log)]
        if name == "sampler_gap":
            steps = [row for row in steps if not row.get("forward_recorded")]
        values = [row[name] for row in steps if name in row]
        if values:
            size = max(1, round(_LAST_SHARE * len(values)))
            found.append((float(np.mean(values[-size:])), float(np.mean(values[:size]))))
    if not found:
        return None
    last, start = np.mean(found, axis=0)
    return float(last), float(start)
