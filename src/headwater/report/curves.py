"""Learning curves of a run: which lines to draw for which kind of stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.plain_json import parse_json, read_json_file
from headwater.report.diagnostics import claimed_arms
from headwater.report.results import Results, StageRow
from headwater.workflow.store import MANIFEST

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something logged at each step: its key in metrics.jsonl, its name and its unit."""

    key: str
    name: str
    unit: str


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a panel: the seeds of the same stage of the same arms.

    runs: one (steps, values) pair for each seed.
    """

    label: str
    style: int
    runs: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot: a quantity over the steps of all stages of one kind."""

    kind: str
    quantity: Quantity
    lines: tuple[Line, ...]


#: Of one panel: more cannot be told apart.
LINES_AT_MOST = 8
_LINES_AT_LEAST = 4


@dataclass(frozen=True, slots=True)
class OtherCurves:
    """Stages that found no place among the leading ones; `legend` is (label, style)."""

    legend: tuple[tuple[str, int], ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class KindCurves:
    """All curves of one kind of stage; `legend` is (label, style).

    leading, further: the stages that the study's claims are about, or all of a few. others: the
    rest, in portions.
    """

    kind: str
    legend: tuple[tuple[str, int], ...]
    leading: tuple[Panel, ...]
    further: tuple[Panel, ...]
    others: tuple[OtherCurves, ...] = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """The same stage under different seeds."""

    label: str
    fingerprints: list[str]
    used_by: tuple[str, ...]


_LOSS = Quantity("loss", "loss", "nats")
_KL = Quantity("kl", "KL", "nats")
_ENTROPY = Quantity("entropy", "entropy", "nats")
_TRUNCATED = Quantity("truncation_rate", "truncated responses", "share")
_LENGTH = Quantity("response_tokens", "response length", "tokens")
_GRADIENT = Quantity("grad_norm", "gradient norm", "")
_GAP = Quantity("sampler_gap", "sampler and trainer gap", "nats")
_SPEED = Quantity("tokens_per_second", "tokens per second", "")
_REPETITION = Quantity("repetition", "repeated 4-grams", "share")
_REWARD = (Quantity("pass_rate", "pass rate", "share"), Quantity("reward", "reward", ""))
_SIGNAL = (
    Quantity("reference_kl", "KL to the reference", "nats"),
    Quantity("zero_variance_share", "groups without signal", "share"),
)
_TEACHER = (  # how near a student's next-token distributions are to its teacher's
    Quantity("teacher_entropy", "entropy of the teacher", "nats"),
    Quantity("top_overlap", "overlap of top tokens", "share"),
    Quantity("overlap_mass", "mass on shared top tokens", "share"),
)

# Kind -> what shows whether it learned, then what shows how it behaved.
_QUANTITIES: Mapping[str, tuple[tuple[Quantity, ...], tuple[Quantity, ...]]] = {
    "grpo": (
        (*_REWARD, _LENGTH, _ENTROPY),
        (
            *_SIGNAL,
            _TRUNCATED,
            _REPETITION,
            _GRADIENT,
            _GAP,
            _SPEED,
        ),
    ),
    "warmup": (
        (Quantity("kl", "forward KL", "nats"), _ENTROPY),
        (*_TEACHER, _LOSS, _GRADIENT, _LENGTH, _SPEED),
    ),
    "opd": (
        (_KL, _ENTROPY, _LENGTH),
        (*_TEACHER, _LOSS, _TRUNCATED, _REPETITION, _GRADIENT, _GAP, _SPEED),
    ),
    "mixed": (
        (*_REWARD, _KL, _LENGTH, _ENTROPY),
        (
            Quantity("lambda", "weight of the reward (lambda)", "share"),
            *_SIGNAL,
            *_TEACHER,
            _LOSS,
            _TRUNCATED,
            _REPETITION,
            _GRADIENT,
            _GAP,
            _SPEED,
        ),
    ),
}
#: Kinds that minimise a divergence from a teacher, and the setting that says which.
_DIVERGENCES = {"opd": "kl", "mixed": "divergence"}
_OTHER_KINDS = ((_LOSS, _KL), (_ENTROPY, _GRADIENT, _SPEED))
_PREPARING = ("pretrain", "sft")
_REPEATS = {"reward": "pass_rate", "loss": "kl"}  # drawn only when it differs from its twin


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Rows of a metrics.jsonl by step; a step logged twice keeps its last row.

    A torn last line, which an interruption leaves, is passed over. Raises InputError with
    file:line for any other line that is not an object with an integer "step".
    """
    rows: dict[int, dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            step = row["step"]
            rows[int(step)] = {
                key: float(value)
                for key, value in row.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(
                f'{path}:{number}: {line[:80]!r} is not a metrics row; expected {{"step": 0, '
                "...}: mend or remove the line"
            ) from error
    return rows


def learning_curves(results: Results, run_dir: Path) -> list[KindCurves]:
    """Panels for each kind of stage that learned; what prepares the models comes last."""
    kinds = dict.fromkeys(stage.kind for stage in results.stages)
    ordered = sorted(kinds, key=lambda kind: kind in _PREPARING)
    found = [
        _kind_curves(
            kind, [stage for stage in results.stages if stage.kind == kind], results, run_dir
        )
        for kind in ordered
    ]
    return [curves for curves in found if curves.leading]


def _kind_curves(
    kind: str, stages: Sequence[StageRow], results: Results, run_dir: Path
) -> KindCurves:
    metrics = {}
    for stage in stages:
        path = run_dir / "artifacts" / stage.fingerprint / METRICS_FILE
        if path.is_file():
            metrics[stage.fingerprint] = read_metrics(path)
    groups = _group_seeds([stage for stage in stages if stage.fingerprint in metrics], results)
    first, *others = _portions(groups, claimed_arms(results)) or [[]]
    leading, further = _QUANTITIES.get(kind, _OTHER_KINDS)
    if kind in _DIVERGENCES:
        manifests = [run_dir / "artifacts" / one / MANIFEST for one in metrics]
        name = _divergence_name(manifests, _DIVERGENCES[kind])
        leading = tuple(replace(one, name=name) if one is _KL else one for one in leading)
    panels = _panels(kind, (*leading, *further), first, metrics)
    return KindCurves(
        kind=kind,
        legend=_legend(first),
        leading=tuple(panel for panel in panels if panel.quantity in leading),
        further=tuple(panel for panel in panels if panel.quantity not in leading),
        others=tuple(
            OtherCurves(_legend(portion), _panels(kind, leading, portion, metrics))
            for portion in others
        ),
    )


def _legend(groups: Sequence[_Group]) -> tuple[tuple[str, int], ...]:
    return tuple((group.label, style) for style, group in enumerate(groups))


def _portions(groups: Sequence[_Group], claimed: Sequence[str]) -> list[list[_Group]]:
    """All groups if they are few; else first those of the claimed arms, then the rest in order."""
    if len(groups) <= LINES_AT_MOST:
        return [list(groups)]
    wanted = [group for group in groups if set(claimed) & set(group.used_by)]
    main: list[_Group] = []
    for group in (*wanted, *groups):
        enough = LINES_AT_MOST if group in wanted else _LINES_AT_LEAST
        if group not in main and len(main) < enough:
            main.append(group)
    main.sort(key=groups.index)
    rest = [group for group in groups if group not in main]
    return [main, *(rest[i : i + LINES_AT_MOST] for i in range(0, len(rest), LINES_AT_MOST))]


def _divergence_name(manifests: Iterable[Path], setting: str) -> str:
    """What these stages minimise, as their settings say; "KL" where they differ or are lost."""
    kinds = {_divergence_kind(path, setting) for path in manifests}
    kind = kinds.pop() if len(kinds) == 1 else None
    return f"{kind} KL" if kind else "KL"


def _divergence_kind(manifest: Path, setting: str) -> str | None:
    try:
        settings: Any = read_json_file(manifest)["config"][setting]
        return str(settings["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _group_seeds(stages: Iterable[StageRow], results: Results) -> list[_Group]:
    """The same stages under different seeds together, labelled by model, pool and arms."""
    titles = results.titles()
    groups: dict[tuple[object, ...], _Group] = {}
    nth: Counter[tuple[object, ...]] = Counter()
    taken: Counter[str] = Counter()
    for stage in stages:
        same = stage.model, stage.pool, stage.used_by
        nth[(*same, stage.seed)] += 1
        key = (*same, nth[(*same, stage.seed)])
        if key not in groups:
            arms = [titles.get(arm, arm) for arm in stage.used_by]
            users = ", ".join(arms[:2])
            if len(arms) > 2:
                users = f"{arms[0]} and {len(arms) - 1} more" if stage.pool else f"{len(arms)} arms"
            label = f"{stage.model}{f' on {stage.pool}' if stage.pool else ''}"
            label += f" ({users})" if users else ""
            taken[label] += 1
            if taken[label] > 1:
                label += f", stage {taken[label]}"
            groups[key] = _Group(label, [], stage.used_by)
        groups[key].fingerprints.append(stage.fingerprint)
    return list(groups.values())


def _panels(
    kind: str,
    quantities: Sequence[Quantity],
    groups: Sequence[_Group],
    metrics: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> tuple[Panel, ...]:
    panels: list[Panel] = []
    drawn: dict[str, tuple[Line, ...]] = {}
    for quantity in quantities:
        lines = tuple(
            Line(group.label, style, runs)
            for style, group in enumerate(groups)
            if (runs := _runs(quantity.key, [metrics[one] for one in group.fingerprints]))
        )
        twin = _REPEATS.get(quantity.key)
        if lines and not (twin and drawn.get(twin) == lines):
            panels.append(Panel(kind, quantity, lines))
        drawn[quantity.key] = lines
    return tuple(panels)


def _runs(
    key: str, metrics: Iterable[Mapping[int, Mapping[str, float]]]
) -> tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]:
    runs = []
    for rows in metrics:
        steps = tuple(step for step in sorted(rows) if key in rows[step])
        if steps:
            runs.append((steps, tuple(rows[step][key] for step in steps)))
    return tuple(runs)
