"""Where the rule holds: the map as a grid, in words, and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headwater.report.quantities import count
from headwater.report.results import MapCell, MapResult, Results
from headwater.report.tables import Chance, Column, Gap, Score, Table, TableRow


@dataclass(frozen=True, slots=True)
class MapLine:
    """One student: its share of right answers untrained, and its cells by number of labels."""

    student: str
    base_rate: float
    cells: tuple[MapCell | None, ...]


@dataclass(frozen=True, slots=True)
class MapGrid:
    """Students by rising base rate, and the numbers of labels of the columns.

    largest: the largest difference either way, for the strength of colours.
    """

    labels: tuple[int, ...]
    lines: tuple[MapLine, ...]
    largest: float

    def strength(self, cell: MapCell) -> int:
        """How strong a cell's colour is: 1 to 4; 0 where the arms cannot be told apart."""
        if cell.outcome == "ties":
            return 0
        return min(4, 1 + int(4 * abs(cell.difference) / self.largest * 0.999))


def grid_of(found: MapResult) -> MapGrid:
    """The cells by student and number of labels."""
    labels = tuple(sorted({cell.labels for cell in found.cells}))
    rates: dict[str, float] = {}
    for cell in found.cells:
        rates.setdefault(cell.student, cell.base_rate)
    place = {(cell.student, cell.labels): cell for cell in found.cells}
    lines = (
        MapLine(student, rates[student], tuple(place.get((student, one)) for one in labels))
        for student in sorted(rates, key=lambda name: rates[name])
    )
    largest = max((abs(cell.difference) for cell in found.cells), default=0.0) or 1.0
    return MapGrid(labels, tuple(lines), largest)


def map_words(results: Results) -> str:
    """A sentence that says where the rule wins and where not; empty without a map."""
    if results.map is None or not results.map.cells:
        return ""
    titles = results.titles()
    rule, against = (titles.get(name, name) for name in (results.map.rule, results.map.against))
    cells = results.map.cells
    won, lost = (
        [cell for cell in cells if cell.outcome == outcome] for outcome in ("wins", "loses")
    )
    tied = len(cells) - len(won) - len(lost)
    said = [f"“{rule}” beats “{against}” {_counted('', won, cells)}{_where(won, cells)}"]
    if lost:
        said.append(f"it {_counted('loses ', lost, cells)}{_where(lost, cells)}")
    if tied:
        said.append(f"in {tied} the two cannot be told apart")
    return f"{'; '.join(said)}."


def _counted(verb: str, chosen: Sequence[MapCell], cells: Sequence[MapCell]) -> str:
    """How often, such as "loses in 4 of 12 cells"."""
    return f"{verb}in {len(chosen) or 'none'} of {len(cells)} cells"


def _where(chosen: Sequence[MapCell], cells: Sequence[MapCell]) -> str:
    """Which cells, student by student, unless they are all or none."""
    if len(chosen) in (0, len(cells)):
        return ""
    labels: dict[str, list[int]] = {}
    for cell in sorted(chosen, key=lambda cell: (cell.base_rate, cell.labels)):
        labels.setdefault(cell.student, []).append(cell.labels)
    parts = (f"{student} at {_and(map(count, each))}" for student, each in labels.items())
    return f" ({', '.join(parts)} labels)"


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def map_table(results: Results) -> Table | None:
    """Every cell of the map as a row."""
    if results.map is None or not results.map.cells:
        return None
    grid = grid_of(results.map)
    rows = (
        TableRow(
            (
                line.student,
                Score(line.base_rate),
                count(cell.labels),
                Score(cell.rule),
                Score(cell.against),
                Gap(cell.difference, cell.interval, cell.outcome != "ties"),
                Chance(cell.p_value_corrected),
                cell.outcome,
            )
        )
        for line in grid.lines
        for cell in line.cells
        if cell is not None
    )
    return Table(
        name="map",
        title="Where the rule holds",
        columns=(
            Column("student", number=False),
            Column("untrained"),
            Column("labels"),
            Column("rule"),
            Column("against"),
            Column("difference, points"),
            Column("p (Holm)"),
            Column("the rule", number=False),
        ),
        rows=tuple(rows),
        note=map_words(results),
        group=2,
    )
