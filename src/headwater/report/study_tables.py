"""Tables of what a study claims: verdicts, equal accounts, one training run, shared stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headwater.report.families import FULL_POOL, TAUGHT, Axes, Families
from headwater.report.quantities import duration
from headwater.report.results import DifferenceRow, HypothesisRow, Results, Row
from headwater.report.tables import (
    Amount,
    Amounts,
    Cell,
    Chance,
    Column,
    Gap,
    Gaps,
    Number,
    Pair,
    Score,
    Table,
    TableRow,
    cell_text,
)
from headwater.workflow.graph import EVALUATES

ACCOUNTS = ("labels", "verifier_calls", "generated_tokens", "updates")
_ACCOUNT_NAMES = ("labels", "verifier calls", "generated tokens", "updates")


def study_tables(results: Results) -> tuple[Table, ...]:
    """The tables of this module that have something to say."""
    tables = (
        claims_table(results),
        accounts_table(results),
        one_run_table(results),
        ladder_table(results),
    )
    return tuple(table for table in tables if table.rows)


def students_of(results: Results) -> Mapping[tuple[str, str], Row]:
    """(arm, evaluation set) -> its row: that of its student where it has one."""
    rows: dict[tuple[str, str], Row] = {}
    for row in results.rows:
        if (row.arm, row.eval_set) not in rows or row.evaluates == "student":
            rows[row.arm, row.eval_set] = row
    return rows


def claims_of(
    results: Results, eval_set: str | None = None
) -> Iterable[tuple[HypothesisRow, DifferenceRow]]:
    """Every claim of every hypothesis, on one evaluation set or on all."""
    for hypothesis in results.hypotheses:
        if eval_set in (None, hypothesis.eval_set):
            for index in hypothesis.claims:
                yield hypothesis, results.differences[index]


# --- hypotheses ----------------------------------------------------------------------------------


def claims_table(results: Results) -> Table:
    """Each claim of each hypothesis with its verdict; see `HypothesisRow`."""
    titles = results.titles()
    several = len(results.eval_sets()) > 1
    rows = []
    for hypothesis, row in claims_of(results):
        on: tuple[Cell, ...] = (hypothesis.eval_set,) if several else ()
        rows.append(
            TableRow(
                (
                    hypothesis.name,
                    hypothesis.verdict,
                    *on,
                    claim_words(row, titles),
                    row.verdict,
                    Gap(row.difference, row.interval, row.told_apart),
                    Chance(row.p_value_corrected),
                    Number(100 * row.minimum_detectable, 1),
                ),
                _sources(results, row),
            )
        )
    texts = ("hypothesis", "verdict", *(("on",) if several else ()), "claim", "claim's verdict")
    return Table(
        name="hypotheses",
        title="Hypotheses",
        columns=(
            *(Column(name, number=False) for name in texts),
            Column("difference, points"),
            Column("p (Holm)"),
            Column("detectable, points"),
        ),
        rows=tuple(rows),
        note="Differences in avg@k with 95% intervals; p-values corrected over all comparisons; "
        "detectable is the true difference that four in five such studies would find.",
        group=3 if several else 2,
    )


def claim_words(row: DifferenceRow, titles: Mapping[str, str]) -> str:
    """What a contrast claims, such as "A > B" or, with a margin, "A ≥ B − 1.0 points"."""
    better, than = titles[row.better], titles[row.than]
    if row.not_worse_by is None:
        return f"{better} > {than}"
    return f"{better} ≥ {than}, less {row.not_worse_by * 100:.1f} points"


def _sources(results: Results, row: DifferenceRow) -> tuple[str, ...]:
    rows = students_of(results)
    arms = [rows[arm, row.eval_set] for arm in (row.better, row.than)]
    return tuple(one for arm in arms for one in arm.evaluations)


# --- equal on which account ----------------------------------------------------------------------


def accounts_table(results: Results) -> Table:
    """For each contrast with a `match`: what both arms used on all accounts, and how it came out.

    "Same labels" is not "same number of graded rollouts": this is the answer, account by account.
    """
    titles, rows = results.titles(), students_of(results)
    several = len(results.eval_sets()) > 1
    found = []
    for row in results.differences:
        if not row.match:
            continue
        first, second = (
            rows[arm, row.eval_set].spent_after_bases for arm in (row.better, row.than)
        )
        amounts = (
            Amounts(name, first.get(name, 0), second.get(name, 0), name in row.match)
            for name in ACCOUNTS
        )
        on: tuple[Cell, ...] = (row.eval_set,) if several else ()
        found.append(
            TableRow(
                (
                    " and ".join(name.replace("_", " ") for name in row.match),
                    Pair(titles[row.better], titles[row.than]),
                    *on,
                    *amounts,
                    Gap(row.difference, row.interval, row.told_apart),
                    Chance(row.p_value_corrected),
                ),
                _sources(results, row),
            )
        )
    return Table(
        name="accounts",
        title="The same contrast, made equal on one account after another",
        columns=(
            Column("equal in", number=False),
            Column("arms", number=False, whole=True),
            *((Column("on", number=False),) if several else ()),
            *(Column(name) for name in _ACCOUNT_NAMES),
            Column("difference, points"),
            Column("p (Holm)"),
        ),
        rows=tuple(found),
        note="Amounts are first arm | second arm, for one seed, with all stages they build on, the "
        "making of the base models left out. Where an arm spent another amount than its "
        "counterpart, a longer or shorter sibling of it was trained for the comparison.",
    )


# --- one training run ----------------------------------------------------------------------------


def one_run_table(results: Results) -> Table:
    """What single training runs would have claimed beside what all of them show; [] with one seed.

    The paper has one run a row, with the standard error over problems.
    """
    titles, rows = results.titles(), students_of(results)
    eval_set = results.eval_sets()[0] if results.rows else ""
    found: dict[tuple[str, str], TableRow] = {}
    for hypothesis, row in claims_of(results, eval_set):
        better, than = rows[row.better, eval_set], rows[row.than, eval_set]
        if len(better.per_seed) != len(than.per_seed) or len(better.per_seed) < 2:
            continue
        seeds = tuple(a - b for a, b in zip(better.per_seed, than.per_seed, strict=True))
        found.setdefault(
            (row.better, row.than),
            TableRow(
                (
                    hypothesis.name,
                    Pair(titles[row.better], titles[row.than]),
                    Pair(_with_error(better), _with_error(than)),
                    Gaps(seeds),
                    _single_claims(seeds, better.standard_error, than.standard_error),
                    Gap(row.difference, row.interval, row.told_apart),
                    Chance(row.p_problems),
                    Chance(row.p_value),
                ),
                _sources(results, row),
            ),
        )
    return Table(
        name="one-run",
        title="What one training run would have claimed",
        columns=(
            Column("", number=False),
            Column("arms", number=False, whole=True),
            Column("avg@k ± SE"),
            Column("difference, seed by seed"),
            Column("runs that claim it, or the reverse"),
            Column("over seeds and problems"),
            Column("p, problems only"),
            Column("p, with training luck"),
        ),
        rows=tuple(found.values()),
        note="± is the paper's: the standard error over problems. One run claims a difference that "
        "is larger than 1.96 times both errors together. That and the p-value over problems speak "
        "of these checkpoints; only the interval and p-value over seeds and problems speak of the "
        "method. Neither p is corrected here; with a margin, the last one is of the margin.",
    )


def _single_claims(seeds: tuple[float, ...], *errors: float | None) -> Cell:
    """How many seeds, each for itself, differ by more than the paper's errors allow; both ways."""
    if any(error is None for error in errors):
        return None
    beyond = 1.96 * math.sqrt(sum(error**2 for error in errors if error is not None))
    ahead, behind = (sum(sign * one > beyond for one in seeds) for sign in (1, -1))
    return Pair(str(ahead), str(behind))


def _with_error(row: Row) -> str:
    return cell_text(Score(row.avg_at_k, error=row.standard_error))


# --- from sparse to dense ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rung:
    """One arm of the density ladder and what its student learned from."""

    signal: str
    row: Row


def ladder(results: Results) -> tuple[Rung, ...]:
    """The main RL'd teacher's ways to its student, by how dense the signal is; () for under three.

    The main teacher is the one with most of them; of several the first.
    """
    if not results.rows:
        return ()
    families = Families(results)
    ordinary = [(route.arm, axes) for route, axes in families.ordinary()]
    taught = [axes for _, axes in ordinary if axes.taught == "RL'd"]
    pairs = dict.fromkeys((axes.student, axes.teacher) for axes in taught)
    rungs = [_rungs(results, ordinary, families.halves, *pair) for pair in pairs]
    best = max(rungs, key=len, default=())
    return best if len(best) >= 3 else ()


def _rungs(
    results: Results,
    ordinary: Sequence[tuple[str, Axes]],
    halves: tuple[str, ...],
    student: str,
    teacher: str | None,
) -> tuple[Rung, ...]:
    rl = TAUGHT[("grpo",)]
    half, rest = halves if len(halves) == 2 else (None, None)
    full = ((FULL_POOL,), ())
    wanted = (
        ("sparse reward on the student: direct GRPO", None, ((), (("grpo", FULL_POOL),))),
        ("hard labels: SFT on the teacher's samples", "teacher-sample SFT", full),
        ("dense, on-policy: OPD only", "OPD only", full),
        ("dense, off-policy then on-policy: the bridge", "bridge", full),
        (
            "the bridge on half, then sparse reward on the rest",
            "bridge",
            ((half,), (("grpo", rest),)),
        ),
    )
    rows = students_of(results)
    eval_set = results.eval_sets()[0]
    found = []
    for signal, transfer, (pools, then) in wanted:
        for arm, axes in ordinary:
            own = axes.student == student and axes.transfer == transfer
            from_it = transfer is None or (axes.teacher == teacher and axes.taught == rl)
            if own and from_it and (axes.pools, axes.then) == (pools, then):
                row = rows.get((arm, eval_set))
                if row is not None:
                    found.append(Rung(signal, row))
                    break
    return tuple(found)


def ladder_table(results: Results) -> Table:
    """`ladder` as a table."""
    return Table(
        name="density-ladder",
        title="From sparse to dense signals",
        columns=(
            Column("signal", number=False),
            Column("arm", number=False),
            Column("avg@k"),
            Column("labels"),
        ),
        rows=tuple(
            TableRow(
                (
                    rung.signal,
                    rung.row.title,
                    Score(rung.row.avg_at_k, rung.row.interval),
                    Amount("labels", rung.row.spent.get("labels", 0)),
                ),
                rung.row.evaluations,
            )
            for rung in ladder(results)
        ),
    )


# --- trained once --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sharing:
    """Stages of one kind: how many were trained, for how many uses, and the time of both."""

    kind: str
    trained: int
    used: int
    seconds: float
    alone_seconds: float


def sharing(results: Results) -> tuple[Sharing, ...]:
    """By kind of training stage; `used` counts (stage, arm) pairs."""
    found: dict[str, Sharing] = {}
    for stage in results.stages:
        if stage.kind in EVALUATES:
            continue
        users = max(1, len(stage.used_by))
        seconds = stage.spent.get("seconds", 0.0)
        old = found.get(stage.kind, Sharing(stage.kind, 0, 0, 0.0, 0.0))
        found[stage.kind] = Sharing(
            stage.kind,
            old.trained + 1,
            old.used + users,
            old.seconds + seconds,
            old.alone_seconds + users * seconds,
        )
    return tuple(one for one in found.values() if one.seconds)


def total_sharing(results: Results) -> Sharing:
    """All kinds together."""
    kinds = sharing(results)
    return Sharing(
        "all",
        sum(one.trained for one in kinds),
        sum(one.used for one in kinds),
        sum(one.seconds for one in kinds),
        sum(one.alone_seconds for one in kinds),
    )


def sharing_words(results: Results) -> str:
    """One line for the terminal; empty where nothing was shared.

    Such as "184 stages trained once stand for 933 uses: 52 min of stage time instead of 2 h".
    """
    total = total_sharing(results)
    if total.used == total.trained:
        return ""
    return (
        f"{total.trained} stages trained once stand for {total.used} uses: "
        f"{duration(total.seconds)} of stage time instead of {duration(total.alone_seconds)} "
        "had each arm trained alone."
    )
