"""The paper's Tables 2 to 5 of a run, made from routes; one with fewer than two rows is left out.

arXiv:2605.12483, with this run's models and evaluation sets; an arm whose route lies on no axis of
a table is in none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from headwater.report.families import FULL_POOL, TAUGHT, TRANSFERS, Axes, Families
from headwater.report.results import Results, Route, Row
from headwater.report.tables import Cell, Column, Score, Table, TableRow

_TAUGHT_ORDER = tuple(TAUGHT.values())
_TRANSFER_ORDER = tuple(TRANSFERS.values())
_THEN_ORDER = ("bridge alone", "then GRPO on the rest", "then GRPO on the same half (replay)")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row to be: what it is called, and its place in the order of rows."""

    names: tuple[str, ...]
    order: tuple[int, ...]
    arm: str


def paper_tables(results: Results) -> tuple[Table, ...]:
    """Where the labels go, transfer protocol, half split, and the route to stage 3."""
    maker = _Maker(results)
    tables = (maker.where_labels_go(), maker.transfers(), maker.halves(), maker.to_stage_three())
    return tuple(table for table in tables if len(table.rows) >= 2)


class _Maker:
    def __init__(self, results: Results) -> None:
        self._results = results
        self._families = Families(results)
        self._arms: Sequence[tuple[Route, Axes]] = tuple(self._families.ordinary())
        students = dict.fromkeys(axes.student for _, axes in self._arms if axes.teacher)
        self._students = tuple(students)
        known = (name for _, axes in self._arms for name in (axes.student, axes.teacher) if name)
        self._models = tuple(dict.fromkeys([*students, *known]))
        self._rows: dict[tuple[str, str], Row] = {}
        for row in results.rows:
            if (row.arm, row.eval_set) not in self._rows or row.evaluates == "student":
                self._rows[row.arm, row.eval_set] = row

    def where_labels_go(self) -> Table:
        def entries() -> Iterator[_Entry]:
            for route, axes in self._arms:
                if axes.teacher is None and axes.then == (("grpo", FULL_POOL),):
                    place = self._models.index(axes.student)
                    yield _Entry(("direct GRPO", axes.student, "–"), (0, place, 0), route.arm)
                elif axes.transfer == "bridge" and not axes.then and self._on_all_labels(axes):
                    assert axes.teacher and axes.taught
                    yield _Entry(
                        (self._into("bridge", axes), axes.teacher, axes.taught),
                        (1, self._models.index(axes.teacher), _TAUGHT_ORDER.index(axes.taught)),
                        route.arm,
                    )

        return self._table(
            "where-labels-go",
            "Where the labels go",
            ("route", "model or teacher", "teacher taught"),
            entries(),
            "All labels; direct GRPO at every model size, and the bridge from teachers that were "
            "taught with them or not",
        )

    def transfers(self) -> Table:
        return self._table(
            "transfer-protocol",
            "The transfer protocol",
            ("teacher", "taught", "transfer"),
            (
                self._by_teacher(route, axes, axes.transfer, _TRANSFER_ORDER)
                for route, axes in self._arms
                if axes.transfer and not axes.then and self._on_all_labels(axes)
            ),
            "No labels on the student: what each transfer carries over",
            group=2,
        )

    def halves(self) -> Table:
        return self._table(
            "half-split",
            "Half of the labels before the bridge, half after it",
            ("teacher", "taught on half", "and the student"),
            (
                self._by_teacher(route, axes, then, _THEN_ORDER)
                for route, axes in self._arms
                if axes.transfer == "bridge" and (then := self._after_half(axes)) is not None
            ),
            "Replay reads the same half again, with as many rollouts and updates as the rest",
            group=2,
        )

    def to_stage_three(self) -> Table:
        return self._table(
            "route-to-stage-3",
            "The route to stage 3",
            ("teacher", "taught on half", "transfer, before GRPO on the rest"),
            (
                self._by_teacher(route, axes, axes.transfer, _TRANSFER_ORDER)
                for route, axes in self._arms
                if axes.transfer and self._after_half(axes) == _THEN_ORDER[1]
            ),
            "Every row ends with GRPO on the other half of the labels",
            group=2,
        )

    def _by_teacher(self, route: Route, axes: Axes, what: str, order: Sequence[str]) -> _Entry:
        """A row by teacher, how it was taught, and `what`, which has its place in `order`."""
        assert axes.teacher and axes.taught
        place = (
            self._models.index(axes.teacher),
            _TAUGHT_ORDER.index(axes.taught),
            order.index(what),
        )
        return _Entry((axes.teacher, axes.taught, self._into(what, axes)), place, route.arm)

    def _on_all_labels(self, axes: Axes) -> bool:
        return not set(axes.pools) & set(self._families.halves)

    def _after_half(self, axes: Axes) -> str | None:
        """What follows a teacher taught on the first half; None for one taught otherwise."""
        halves = self._families.halves
        if len(halves) != 2 or not set(axes.pools) & {halves[0], "worked"}:
            return None
        words: Mapping[tuple[tuple[str, str], ...], str] = {
            (): _THEN_ORDER[0],
            (("grpo", halves[1]),): _THEN_ORDER[1],
            (("grpo", halves[0]),): _THEN_ORDER[2],
        }
        return words.get(axes.then)

    def _into(self, name: str, axes: Axes) -> str:
        return name if len(self._students) <= 1 else f"{name}, into {axes.student}"

    def _table(
        self,
        name: str,
        title: str,
        heads: tuple[str, str, str],
        entries: Iterator[_Entry],
        note: str,
        group: int = 1,
    ) -> Table:
        """Rows in order; of arms with the same names the first stands."""
        firsts: dict[tuple[str, ...], _Entry] = {}
        for entry in entries:
            firsts.setdefault(entry.names, entry)
        ordered = sorted(firsts.values(), key=lambda entry: entry.order)
        sets = self._results.eval_sets()
        scores = (Column(f"{eval_set} avg@{self._attempts(eval_set)}") for eval_set in sets)
        return Table(
            name=name,
            title=title,
            columns=(*(Column(head, number=False) for head in heads), *scores),
            rows=tuple(self._row(entry, sets) for entry in ordered),
            note=f"{note}. In brackets the 95% interval.",
            group=group,
        )

    def _row(self, entry: _Entry, sets: Sequence[str]) -> TableRow:
        rows = [self._rows.get((entry.arm, eval_set)) for eval_set in sets]
        scores: list[Cell] = [
            None if row is None else Score(row.avg_at_k, row.interval) for row in rows
        ]
        sources = tuple(one for row in rows if row for one in row.evaluations)
        return TableRow((*entry.names, *scores), sources)

    def _attempts(self, eval_set: str) -> int:
        return next(row.attempts for row in self._results.rows if row.eval_set == eval_set)
