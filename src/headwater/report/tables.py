"""One record of a table, and its texts: for the page, as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.report.quantities import bare_p_value, points, spent, tiny
from headwater.storage import write_whole
from headwater.visible import csv_text, visible

TABLES_FOLDER = "tables"


@dataclass(frozen=True, slots=True)
class Score:
    """A share with its 95 % interval, or its standard error; both as shares."""

    value: float
    interval: tuple[float, float] | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of shares with its 95 % interval; told_apart sets it in bold."""

    value: float
    interval: tuple[float, float] | None = None
    told_apart: bool = False


@dataclass(frozen=True, slots=True)
class Gaps:
    """One difference a seed."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chance:
    """A p-value."""

    value: float


@dataclass(frozen=True, slots=True)
class Amount:
    """What one arm spent on an account."""

    counter: str
    value: float


@dataclass(frozen=True, slots=True)
class Amounts:
    """What two arms spent on an account, side by side; matched: made equal."""

    counter: str
    first: float
    second: float
    matched: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """What belongs to two arms, one above the other."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Number:
    """Any other number, with so many decimals."""

    value: float
    decimals: int = 3


Cell = str | Score | Gap | Gaps | Chance | Amount | Amounts | Pair | Number | None


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `whole` cells stand on a line of their own on a phone, `number` ones right."""

    name: str
    number: bool = True
    whole: bool = False


@dataclass(frozen=True, slots=True)
class TableRow:
    """Cells in the order of the columns; sources: fingerprints the row comes from."""

    cells: tuple[Cell, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """name: a file name. note: what a reader has to know to read it.

    group: this many leading columns are left blank where they repeat the row above.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    note: str = ""
    group: int = 0

    def repeats(self, row: int, column: int) -> bool:
        """Whether this cell repeats the group of the row above."""
        if row == 0 or column >= self.group:
            return False
        upto = column + 1
        return self.rows[row].cells[:upto] == self.rows[row - 1].cells[:upto]


# --- text ----------------------------------------------------------------------------------------


def cell_text(cell: Cell) -> str:
    """A cell as a person reads it, on one line.

    >>> cell_text(Score(0.939, (0.925, 0.949))), cell_text(Score(0.5, error=0.012))
    ('93.9 (92.5 to 94.9)', '50.0 ± 1.2')
    >>> cell_text(Gap(0.02, (-0.01, 0.05))), cell_text(Amounts("updates", 10, 20)), cell_text(None)
    ('+2.0 (−1.0 to +5.0)', '10 | 20', '–')
    """
    main, aside = cell_parts(cell)
    return f"{main} {aside}" if aside else main


def cell_lines(cell: Cell) -> tuple[str, str] | None:
    """The two lines of a cell that belongs to two arms; None for any other."""
    match cell:
        case Pair(first, second):
            return first, second
        case Amounts(counter, first_amount, second_amount):
            return spent(counter, first_amount), spent(counter, second_amount)
    return None


def cell_parts(cell: Cell) -> tuple[str, str]:
    """What stands in a cell, and what stands there in small print."""
    match cell:
        case None:
            return "–", ""
        case Score(value, interval, error):
            aside = f"± {error * 100:.1f}" if error is not None else ""
            if interval is not None:
                aside = f"({interval[0] * 100:.1f} to {interval[1] * 100:.1f})"
            return f"{value * 100 + 1e-9:.1f}", aside
        case Gap(value, interval):
            aside = "" if interval is None else f"({points(interval[0])} to {points(interval[1])})"
            return points(value), aside
        case Gaps(values):
            return "  ".join(points(value) for value in values), ""
        case Chance(value):
            return bare_p_value(value), ""
        case Amount(counter, value):
            return spent(counter, value), ""
        case Amounts(counter, first, second):
            return f"{spent(counter, first)} | {spent(counter, second)}", ""
        case Pair(first, second):
            return f"{first} | {second}", ""
        case Number(value, decimals):
            small = 0.0 < abs(value) < 0.5 * 10.0**-decimals
            text = tiny(float(f"{value:.0e}")) if small else f"{value:.{decimals}f}"
            return text.replace("-", "−"), ""
        case _:
            return cell, ""


# --- CSV -----------------------------------------------------------------------------------------


def as_csv(table: Table) -> str:
    """The table with full numbers, shares as shares; an interval has columns of its own.

    A text that a spreadsheet would take for a formula is given a leading apostrophe.
    """
    names = [_csv_names(table, index) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([csv_text(name) for part in names for name in part] + ["fingerprints"])
    for row in table.rows:
        values = [
            value
            for cell, part in zip(row.cells, names, strict=True)
            for value in _padded(_csv_values(cell), len(part))
        ]
        writer.writerow([*values, " ".join(row.sources)])
    return out.getvalue()


def _padded(values: Sequence[object], length: int) -> list[object]:
    return [*values, *[""] * (length - len(values))]


def _csv_names(table: Table, index: int) -> list[str]:
    """Headings of one column, by the widest of its cells."""
    name = table.columns[index].name
    parts: list[str] = [name]
    for row in table.rows:
        found = _csv_suffixes(row.cells[index])
        if len(found) > len(parts):
            parts = [f"{name} {suffix}".rstrip() for suffix in found]
    return parts


def _csv_suffixes(cell: Cell) -> tuple[str, ...]:
    match cell:
        case Score(interval=tuple()) | Gap(interval=tuple()):
            return "", "low", "high"
        case Score(error=float()):
            return "", "standard error"
        case Gaps(values):
            return tuple(f"run {index + 1}" for index in range(len(values)))
        case Amounts() | Pair():
            return "first", "second"
    return ("",)


def _csv_values(cell: Cell) -> tuple[object, ...]:
    match cell:
        case None:
            return ("",)
        case Score(value, tuple() as interval) | Gap(value, tuple() as interval):
            return value, *interval
        case Score(value, None, float() as error):
            return value, error
        case Gaps(values):
            return values
        case Amounts(_, first, second):
            return first, second
        case Pair(first, second):
            return csv_text(first), csv_text(second)
        case Score() | Gap() | Chance() | Amount() | Number():
            return (cell.value,)
        case _:
            return (csv_text(cell),)


# --- LaTeX ---------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "\N{NO-BREAK SPACE}": "~",
    "−": r"$-$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "–": "--",
    "\n": " ",
}


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is.

    >>> print(latex_text("50% of $x_1$ & \\\\input{y}"))
    50\\% of \\$x\\_1\\$ \\& \\textbackslash{}input\\{y\\}
    """
    return "".join(_LATEX.get(character, character) for character in visible(text))


def as_latex(table: Table) -> str:
    """A booktabs table with caption and label; needs \\usepackage{booktabs}."""
    alignment = "".join("r" if column.number else "l" for column in table.columns)
    label = "".join(c if c.isalnum() else "-" for c in table.name)
    heads = " & ".join(latex_text(column.name) for column in table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}. {latex_text(table.note)}}}".replace(". }", ".}"),
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        rf"{heads} \\",
        r"\midrule",
        *(_latex_row(table, index) for index in range(len(table.rows))),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(table: Table, index: int) -> str:
    cells = []
    for column, cell in enumerate(table.rows[index].cells):
        text = latex_text(cell_text(cell))
        if isinstance(cell, Gap) and cell.told_apart:
            text = rf"\textbf{{{text}}}"
        cells.append("" if table.repeats(index, column) else text)
    # A bracket after a line's end would be taken for its argument.
    return (r"{}" if cells[0].startswith("[") else "") + " & ".join(cells) + r" \\"


# --- files ---------------------------------------------------------------------------------------


def write_tables(tables: Iterable[Table], run_dir: Path) -> tuple[Path, ...]:
    """Write RUN/tables/NAME.csv and .tex of each table; those of an earlier report are removed."""
    folder = run_dir / TABLES_FOLDER
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.csv"), *folder.glob("*.tex")):
        old.unlink()
    paths = []
    for table in tables:
        for suffix, text in ((".csv", as_csv(table)), (".tex", as_latex(table))):
            path = folder / f"{table.name}{suffix}"
            write_whole(path, text)
            paths.append(path)
    return tuple(paths)
