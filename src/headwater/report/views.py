"""What the page's sections show of the results: arms in families, stages, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.report.diagnostics import claimed_arms, distinct_probes, probes_table
from headwater.report.families import FAMILIES, FOLDED, Families
from headwater.report.quantities import COUNTER_NAMES, TABLE_COUNTERS
from headwater.report.results import DifferenceRow, HypothesisRow, ProbeRow, Results, Row, StageRow
from headwater.report.samples import ReadRollout, draw_lots, rollouts_of_arm
from headwater.report.scale import Scale, difference_scale, scale_of
from headwater.report.tables import Amount, Column, Number, Score, Table, TableRow
from headwater.types import Verdict

FLAT_AT_MOST = 12  # rows of a table of arms from which on families are told apart
_SAMPLES_EACH = 2  # correct and other rollouts shown for an arm
_WRONG = (Verdict.INCORRECT.value, Verdict.UNPARSEABLE.value, Verdict.TIMEOUT.value)


@dataclass(frozen=True, slots=True)
class ArmGroup:
    """The rows of one family."""

    title: str
    folded: bool
    rows: tuple[Row, ...]

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest score."""
        scores = [row.avg_at_k for row in self.rows]
        return min(scores), max(scores)


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The rows of one evaluation set and their common axis; `base` is the untrained student's.

    groups: the rows by family; a single one while they are few.
    """

    eval_set: str
    rows: tuple[Row, ...]
    scale: Scale
    base: Row | None
    groups: tuple[ArmGroup, ...]

    @property
    def spends(self) -> bool:
        """Whether any row knows what it spent."""
        return any(row.spent for row in self.rows)


def result_table(results: Results, eval_set: str) -> ResultTable:
    """The arms of one evaluation set, in families where they are many."""
    rows = tuple(row for row in results.rows if row.eval_set == eval_set)
    base = [row for row in rows if row.evaluates == "student" and not row.chain]
    groups = arm_groups(results, rows)
    return ResultTable(eval_set, rows, scale_of(rows), base[0] if base else None, groups)


def arm_groups(results: Results, rows: tuple[Row, ...]) -> tuple[ArmGroup, ...]:
    """Rows by family, in the order of FAMILIES; one group of all of them while they are few."""
    if len(rows) <= FLAT_AT_MOST:
        return (ArmGroup("", False, rows),)
    families = Families(results)
    by_family: dict[str, list[Row]] = {family: [] for family in FAMILIES}
    bases: set[tuple[str, ...]] = set()
    for row in rows:
        family = families.family(row)
        if family == "base" and row.evaluations in bases:  # a cell's untrained student
            family = "map"
        bases.add(row.evaluations)
        by_family[family].append(row)
    return tuple(
        ArmGroup(FAMILIES[family], family in FOLDED, tuple(found))
        for family, found in by_family.items()
        if found
    )


def arms_table(results: Results) -> Table:
    """Every row of the results with its family and what it spent."""
    rows = tuple(
        TableRow(
            (
                group.title,
                row.title,
                row.eval_set,
                Score(row.avg_at_k, row.interval),
                Number(100 * row.standard_error, 2) if row.standard_error is not None else None,
                *(Amount(name, row.spent.get(name, 0)) for name in TABLE_COUNTERS),
            ),
            row.evaluations,
        )
        for eval_set in results.eval_sets()
        for group in arm_groups(
            results, tuple(one for one in results.rows if one.eval_set == eval_set)
        )
        for row in group.rows
    )
    return Table(
        name="arms",
        title="What each arm reached",
        columns=(
            *(Column(name, number=False) for name in ("family", "arm", "on")),
            Column("avg@k"),
            Column("SE, points"),
            *(Column(COUNTER_NAMES[name]) for name in TABLE_COUNTERS),
        ),
        rows=rows,
        note="SE is over problems; amounts are those of one seed, shared stages included.",
        group=1,
    )


# --- hypotheses ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """The hypotheses on one evaluation set, each with its claims, and the axis of all of them."""

    eval_set: str
    hypotheses: tuple[tuple[HypothesisRow, tuple[DifferenceRow, ...]], ...]
    scale: Scale


def judged(results: Results) -> tuple[Judged, ...]:
    """One for each evaluation set with hypotheses; the first is the primary one."""
    found = []
    for eval_set in results.eval_sets():
        rows = tuple(
            (one, tuple(results.differences[index] for index in one.claims))
            for one in results.hypotheses
            if one.eval_set == eval_set
        )
        if rows:
            scale = difference_scale(claim for _, claims in rows for claim in claims)
            found.append(Judged(eval_set, rows, scale))
    return tuple(found)


def unclaimed(results: Results, *, matched: bool = False) -> tuple[DifferenceRow, ...]:
    """Differences of no hypothesis; those with a `match` have a table of their own on the page."""
    claimed = {index for one in results.hypotheses for index in one.claims}
    return tuple(
        row
        for index, row in enumerate(results.differences)
        if index not in claimed and (matched or not row.match)
    )


# --- probes --------------------------------------------------------------------------------------

_PROBED_ARMS = 12  # from which on only the claims' arms are shown at once


@dataclass(frozen=True, slots=True)
class ProbeView:
    """Probes as a table; bars: (height in per cent, text) of each part of a response, by row."""

    table: Table
    bars: tuple[tuple[tuple[float, str], ...], ...]


@dataclass(frozen=True, slots=True)
class ProbeViews:
    """Those of the arms that the claims are about, and the rest."""

    first: ProbeView | None
    rest: ProbeView | None
    rest_arms: int


def probe_views(results: Results) -> ProbeViews:
    """All probes where few arms have some; else the rest stands apart."""
    probes = distinct_probes(results)
    arms = dict.fromkeys(probe.arm for probe in probes)
    shown = set(arms)
    if len(arms) > _PROBED_ARMS:
        shown &= set(claimed_arms(results))
        shown = shown or set(list(arms)[:_PROBED_ARMS])
    first = [probe for probe in probes if probe.arm in shown]
    rest = [probe for probe in probes if probe.arm not in shown]
    return ProbeViews(_probes(results, first), _probes(results, rest), len(arms) - len(shown))


def _probes(results: Results, probes: Sequence[ProbeRow]) -> ProbeView | None:
    if not probes:
        return None
    largest: dict[str, float] = {}
    for probe in probes:
        found = (place.reverse_kl for place in probe.positions)
        largest[probe.arm] = max(largest.get(probe.arm, 0.0), *found, 0.0)
    bars = tuple(
        tuple(
            (100 * place.reverse_kl / (largest[probe.arm] or 1.0), f"{place.reverse_kl:.4f}")
            for place in probe.positions
        )
        for probe in probes
    )
    return ProbeView(probes_table(results, probes), bars)


# --- stages and answers --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageGroup:
    """The seeds of one stage as one line of the account; spending is summed over them."""

    stages: tuple[StageRow, ...]
    seconds: float
    spent: Mapping[str, float]

    @property
    def first(self) -> StageRow:
        """Any of the stages; they differ in seed, fingerprint and spending only."""
        return self.stages[0]


def stage_groups(results: Results) -> list[StageGroup]:
    """Every stage, its seeds together."""
    groups: dict[tuple[object, ...], list[StageRow]] = {}
    nth: dict[tuple[object, ...], int] = {}
    for stage in results.stages:
        key = (stage.kind, stage.model, stage.pool, stage.used_by)
        nth[(*key, stage.seed)] = nth.get((*key, stage.seed), 0) + 1
        groups.setdefault((*key, nth[(*key, stage.seed)]), []).append(stage)
    return [_stage_group(stages) for stages in groups.values()]


def _stage_group(stages: list[StageRow]) -> StageGroup:
    names = dict.fromkeys(name for stage in stages for name in stage.spent)
    summed: dict[str, float] = {
        name: sum(stage.spent.get(name, 0) for stage in stages) for name in names
    }
    for name in ("labels", "peak_memory_bytes"):  # seeds read the same labels
        summed[name] = max((stage.spent.get(name, 0) for stage in stages), default=0)
    return StageGroup(tuple(stages), sum(stage.seconds for stage in stages), summed)


@dataclass(frozen=True, slots=True)
class ArmSamples:
    """Rollouts to read of one arm's model."""

    arm: str
    title: str
    evaluates: str
    rollouts: tuple[ReadRollout, ...]


def arm_samples(results: Results, run_dir: Path) -> list[ArmSamples]:
    """Right and other answers of every row's model, drawn by lot."""
    found: dict[tuple[str, str], ArmSamples] = {}
    for row in results.rows:
        if (row.arm, row.evaluates) in found:
            continue
        rollouts = rollouts_of_arm(run_dir, results, row)
        right = draw_lots(rollouts, (Verdict.CORRECT.value,), _SAMPLES_EACH)
        missed = draw_lots(rollouts, _WRONG, _SAMPLES_EACH)
        shown = (right + missed) or draw_lots(rollouts, (None,), _SAMPLES_EACH)
        if shown:
            found[row.arm, row.evaluates] = ArmSamples(
                row.arm, row.title, row.evaluates, tuple(shown)
            )
    return list(found.values())
