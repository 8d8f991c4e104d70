"""The closing summary in the terminal: one table, the differences, and plain words."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from headwater.report.quantities import (
    COUNTER_NAMES,
    TABLE_COUNTERS,
    bare_p_value,
    percent,
    points,
    spent,
)
from headwater.report.results import Results, Row
from headwater.report.scale import Scale, scale_of
from headwater.report.visible import visible
from headwater.report.words import closing_words

_SHORT = {"verifier_calls": "calls", "generated_tokens": "tokens", "seconds": "time"}
_WHISKER_COLUMNS = 25
_MEDIUM = 90  # console columns from which the interval has a column
_WIDE = 110  # console columns from which the whiskers fit
_SENTENCE_STYLES = {
    "headline": "bold",
    "next": "",
    "against": "yellow",
    "open": "",
    "found": "",
    "caveat": "dim",
}


def print_summary(results: Results, console: Console) -> None:
    """Print the table of each evaluation set, the differences and the closing sentences."""
    for eval_set in results.eval_sets():
        console.print(result_table(results, eval_set, width=console.width))
    if any(row.spent for row in results.rows):
        console.print(Padding(Text(_what_is_charged(results), style="dim"), (0, 0, 1, 0)))
    if results.differences:
        console.print(difference_table(results))
    for warning in results.warnings:
        console.print(Text(f"warning: {visible(warning)}", style="yellow"))
    for sentence in closing_words(results):
        text = Text(visible(sentence.text), style=_SENTENCE_STYLES[sentence.kind])
        console.print(Padding(text, (0, 0, 1 if sentence.kind == "headline" else 0, 0)))


def result_table(results: Results, eval_set: str, *, width: int = _WIDE) -> Table:
    """One row an arm: avg@k with standard error and interval, and what the arm spent.

    width: columns of the console; a narrow one does without whiskers, then without interval.
    """
    wide, medium = width >= _WIDE, width >= _MEDIUM
    rows = [row for row in results.rows if row.eval_set == eval_set]
    scale = scale_of(rows)
    table = Table(
        title=Text(_table_title(eval_set, rows), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", min_width=22)
    table.add_column(f"avg@{rows[0].attempts} ± SE", justify="right", no_wrap=True)
    if medium:
        table.add_column("95% interval", justify="right", no_wrap=True)
    if wide:
        low, high = percent(scale.low)[:-3] + "%", percent(scale.high)[:-3] + "%"
        header = low + " " * (_WHISKER_COLUMNS - len(low) - len(high)) + high
        table.add_column(header, no_wrap=True, min_width=_WHISKER_COLUMNS)
    for counter in TABLE_COUNTERS:
        heading = COUNTER_NAMES[counter]
        table.add_column(heading if wide else _SHORT.get(counter, heading), justify="right")
    for row in rows:
        cells = [Text(visible(row.title)), Text(_score(row), style="bold")]
        if medium:
            cells.append(Text(f"{row.interval[0] * 100:.1f} – {row.interval[1] * 100:.1f}"))
        if wide:
            colour = "dark_orange" if row.evaluates == "teacher" else "dodger_blue2"
            cells.append(Text(whisker(row, scale), style=colour))
        cells += [Text(spent(name, row.spent.get(name, 0))) for name in TABLE_COUNTERS]
        table.add_row(*cells)
    return table


def difference_table(results: Results) -> Table:
    """Declared contrasts with interval, corrected p-value and detectable effect, in points."""
    titles = results.titles()
    table = Table(
        title=Text("differences, in points", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    several = len(results.eval_sets()) > 1
    table.add_column("comparison", overflow="fold")
    if several:
        table.add_column("on")
    for heading in ("difference", "95% interval", "p (Holm)", "detectable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.differences:
        names = Text(visible(f"{titles[row.better]} − {titles[row.than]}"))
        cells = [names, *([Text(visible(row.eval_set))] if several else [])]
        cells += [
            Text(points(row.difference), style="bold" if row.told_apart else ""),
            Text(f"{points(row.interval[0])} to {points(row.interval[1])}"),
            Text(bare_p_value(row.p_value_corrected)),
            Text(f"{row.minimum_detectable * 100:.1f}"),
        ]
        table.add_row(*cells)
    return table


def whisker(row: Row, scale: Scale, columns: int = _WHISKER_COLUMNS) -> str:
    """Interval and mean drawn in characters on `scale`; a teacher's mean is a diamond."""
    place = [round(scale.position(value) * (columns - 1)) for value in row.interval]
    dot = round(scale.position(row.avg_at_k) * (columns - 1))
    cells = [" "] * columns
    for index in range(place[0], place[1] + 1):
        cells[index] = "─"
    cells[place[0]], cells[place[1]] = "├", "┤"
    cells[dot] = "●" if row.evaluates != "teacher" else "◆"
    return "".join(cells)


def _what_is_charged(results: Results) -> str:
    one_seed = " for one seed (the mean over seeds)" if len(results.seeds) > 1 else ""
    return (
        f"Arms are charged{one_seed} with every stage they build on, also shared ones; time is the "
        "sum over these stages, which takes less by the clock where they run side by side."
    )


def _table_title(eval_set: str, rows: list[Row]) -> str:
    seeds = max(len(row.per_seed) for row in rows)
    over = f", {seeds} seeds" if seeds > 1 else ""
    return visible(f"{eval_set}: {rows[0].problems} problems × {rows[0].attempts} attempts{over}")


def _score(row: Row) -> str:
    if row.standard_error is None:
        return percent(row.avg_at_k)
    return f"{percent(row.avg_at_k)[:-1]} ± {row.standard_error * 100:.1f}"
