"""C1 and C2 and the dynamics as tables: is the teacher better, is it near, did training go well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from headwater.report.families import TAUGHT, kind_of
from headwater.report.quantities import stage_name
from headwater.report.results import Distance, DynamicsRow, ProbeRow, Results, StageRow
from headwater.report.study_tables import claims_of
from headwater.report.tables import Cell, Column, Gap, Number, Score, Table, TableRow

_MOMENTS: Mapping[str, str] = {"start": "at the start"}
_Reading = Callable[[DynamicsRow], float | None]
#: Heading, what of a dynamics row is shown, times what, and with how many decimals.
_WATCHED: Sequence[tuple[str, _Reading, float, int]] = (
    ("pass rate, %", lambda row: row.pass_rate, 100.0, 1),
    ("no signal, %", lambda row: row.zero_variance_share, 100.0, 1),
    ("truncated, %", lambda row: row.truncation_rate, 100.0, 1),
    ("repetition, %", lambda row: row.repetition, 100.0, 1),
    ("tokens", lambda row: row.response_tokens, 1.0, 0),
    ("entropy, nats", lambda row: row.entropy, 1.0, 3),
    ("sampler gap, nats", lambda row: row.sampler_gap, 1.0, 4),
    ("gradient norm", lambda row: row.grad_norm, 1.0, 2),
)


def diagnostic_tables(results: Results) -> tuple[Table, ...]:
    """The tables of this module that have rows, whole."""
    tables = (
        gains_table(results),
        probes_table(results, distinct_probes(results)),
        dynamics_table(results, results.dynamics),
    )
    return tuple(table for table in tables if table.rows)


def claimed_arms(results: Results) -> tuple[str, ...]:
    """Arms that a hypothesis speaks of, in the order of its claims; else those of contrasts."""
    rows = [row for _, row in claims_of(results)] or list(results.differences)
    return tuple(dict.fromkeys(arm for row in rows for arm in (row.better, row.than)))


def gains_table(results: Results, eval_set: str | None = None) -> Table:
    """C1: every trained teacher against its own base, on one evaluation set or on all."""
    several = eval_set is None and len(results.eval_sets()) > 1
    rows = [
        TableRow(
            (
                gain.model,
                _taught_words(gain.taught_by),
                *((gain.eval_set,) if several else ()),
                Score(gain.before),
                Score(gain.after),
                Gap(gain.difference, gain.interval, not gain.interval[0] <= 0 <= gain.interval[1]),
            )
        )
        for gain in results.gains
        if eval_set in (None, gain.eval_set)
    ]
    return Table(
        name="teacher-gains",
        title="C1: is the teacher better than its base?",
        columns=(
            Column("teacher", number=False),
            Column("taught by", number=False),
            *((Column("on", number=False),) if several else ()),
            Column("before"),
            Column("after"),
            Column("gain, points"),
        ),
        rows=tuple(rows),
        note="avg@k of a teacher before and after it was taught.",
        group=1,
    )


def _taught_words(stages: Sequence[str]) -> str:
    name = TAUGHT.get(tuple(map(kind_of, stages)))
    how = " → ".join(stage.replace("_", " ") for stage in stages)
    return f"{how}" if name is None else f"{name.removesuffix(chr(39) + 'd')}: {how}"


def probes_table(results: Results, probes: Sequence[ProbeRow]) -> Table:
    """C2: how far students were from their teachers, moment by moment."""
    names = _probed_names(results)
    return Table(
        name="teacher-distance",
        title="C2: is the teacher near?",
        columns=(
            Column("arm", number=False),
            Column("moment", number=False),
            Column("reverse KL"),
            Column("forward KL"),
            Column("overlap, %"),
            Column("overlap mass, %"),
            Column("entropy gap"),
        ),
        rows=tuple(
            TableRow(
                (names[probe.arm], moment_words(probe), *_distance(probe.overall)),
                probe.artifacts,
            )
            for probe in probes
        ),
        note="On the student's own rollouts, in nats a token. Overlap: share of the 16 likeliest "
        "tokens that both have, and their mass. Entropy gap: student less teacher.",
        group=1,
    )


def distinct_probes(results: Results) -> tuple[ProbeRow, ...]:
    """Probes without those of arms that share every one of theirs with an earlier arm."""
    firsts = {arms[0] for arms in _probed_together(results)}
    return tuple(probe for probe in results.probes if probe.arm in firsts)


def _probed_together(results: Results) -> list[list[str]]:
    """Arms whose probes are the same artifacts, together."""
    artifacts: dict[str, list[str]] = {}
    for probe in results.probes:
        artifacts.setdefault(probe.arm, []).extend(probe.artifacts)
    together: dict[tuple[str, ...], list[str]] = {}
    for arm, found in artifacts.items():
        together.setdefault(tuple(found), []).append(arm)
    return list(together.values())


def _probed_names(results: Results) -> dict[str, str]:
    titles = results.titles()
    names: dict[str, str] = {}
    for arms in _probed_together(results):
        more = f" and {len(arms) - 1} more" if len(arms) > 1 else ""
        names |= {arm: f"{titles.get(arm, arm)}{more}" for arm in arms}
    return names


def moment_words(probe: ProbeRow) -> str:
    """When a probe was taken.

    "start" is "at the start", another moment "after warmup" and the like.
    """
    return _MOMENTS.get(probe.after, f"after {probe.after.replace('_', ' ')}")


def _distance(distance: Distance) -> tuple[Cell, ...]:
    return (
        Number(distance.reverse_kl, 4),
        Number(distance.forward_kl, 4),
        Number(100 * distance.top_overlap, 1),
        Number(100 * distance.overlap_mass, 1),
        Number(distance.entropy - distance.teacher_entropy, 3),
    )


def dynamics_table(results: Results, dynamics: Sequence[DynamicsRow]) -> Table:
    """How each stage ended, over its last quarter; columns that no stage logs are left out."""
    logged = [one for one in _WATCHED if any(one[1](row) is not None for row in dynamics)]
    rows = []
    for row in dynamics:
        cells: list[Cell] = []
        for _, read, times, decimals in logged:
            value = read(row)
            cells.append(None if value is None else Number(times * value, decimals))
        rows.append(TableRow((stage_words(row), users(results, row), *cells), row.artifacts))
    return Table(
        name="dynamics",
        title="How training went",
        columns=(
            Column("stage", number=False, whole=True),
            Column("used by", number=False, whole=True),
            *(Column(heading) for heading, *_ in logged),
        ),
        rows=tuple(rows),
        note="Means over the last quarter of a stage's steps, and over seeds.",
    )


def stage_words(row: DynamicsRow | StageRow) -> str:
    """A stage as "teacher grpo on labels"."""
    pool = f" on {row.pool}" if row.pool else ""
    return f"{row.model} {stage_name(row.model, row.kind)}{pool}"


def users(results: Results, row: DynamicsRow | StageRow) -> str:
    """The arms that use a stage, or how many they are."""
    titles = results.titles()
    names = [titles.get(arm, arm) for arm in row.used_by]
    return "; ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def alarms(results: Results) -> tuple[tuple[str, str], ...]:
    """(stage and its arms, words): what guards said while training, then thresholds passed at the
    end.

    Stages with the same alarm but other numbers are separate entries.
    """
    stages = {row.fingerprint: row for row in results.stages}
    said = [(stages[alert.stage], alert.words) for alert in results.alerts]
    seeds = len(results.seeds) > 1
    return (
        *(
            (f"{_who(results, row)}{f', seed {row.seed}' if seeds else ''}", words)
            for row, words in said
        ),
        *((_who(results, row), words) for row in results.dynamics for words in row.alarms),
    )


def _who(results: Results, row: DynamicsRow | StageRow) -> str:
    return f"{stage_words(row)} ({users(results, row)})"
