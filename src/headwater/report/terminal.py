"""The closing summary in the terminal: what was claimed, the arms, and plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from headwater.report.diagnostics import alarms
from headwater.report.quantities import (
    COUNTER_NAMES,
    TABLE_COUNTERS,
    bare_p_value,
    percent,
    points,
    spent,
)
from headwater.report.results import DifferenceRow, HypothesisRow, Results, Row
from headwater.report.scale import Scale, scale_of
from headwater.report.study_tables import sharing_words
from headwater.report.views import arm_groups, unclaimed
from headwater.report.words import closing_words, primary_hypotheses
from headwater.terminal import BAD, CAUTION, GOOD, HEADING, QUIET, STUDENT, TEACHER
from headwater.visible import visible

_SHORT = {"verifier_calls": "calls", "generated_tokens": "tokens"}
_WHISKER_COLUMNS = 25
_MEDIUM = 96  # console columns from which the interval has a column
_ROWS_AT_MOST = 20  # of a table of arms, before only families are shown
_ALARMS_AT_MOST = _WARNINGS_AT_MOST = 6
_VERDICTS = {
    "supported": ("✓", GOOD),
    "refuted": ("✗", BAD),
    "undecided": ("?", CAUTION),
}
_WIDE = 126  # console columns from which the whiskers fit
_SENTENCE_STYLES = {
    "headline": HEADING,
    "next": "",
    "against": CAUTION,
    "open": "",
    "found": "",
    "caveat": QUIET,
}


def print_summary(results: Results, console: Console) -> None:
    """Print hypotheses, the arms of each evaluation set, other differences and sentences.

    Of many arms only their families are shown.
    """
    hypotheses = primary_hypotheses(results)
    if hypotheses:
        console.print(hypothesis_table(results, hypotheses, width=console.width))
        for line in _on_other_sets(results, hypotheses[0].eval_set):
            console.print(Padding(Text(visible(line), style=QUIET), (0, 0, 1, 0), expand=False))
    flat = True
    for eval_set in results.eval_sets():
        rows = tuple(row for row in results.rows if row.eval_set == eval_set)
        if len(rows) <= _ROWS_AT_MOST:
            console.print(result_table(results, eval_set, width=console.width))
        else:
            flat = False
            console.print(family_table(results, rows))
    if flat and any(row.spent for row in results.rows):
        console.print(
            Padding(Text(_what_is_charged(results), style=QUIET), (0, 0, 1, 0), expand=False)
        )
    others = unclaimed(results, matched=True) if hypotheses else results.differences
    if others:
        console.print(difference_table(results, others))
    shared = sharing_words(results)
    if shared:
        console.print(Padding(Text(shared, style=QUIET), (0, 0, 1, 0), expand=False))
    for stage, words in alarms(results)[:_ALARMS_AT_MOST]:
        console.print(Text(visible(f"alarm: {stage}: {words}"), style=CAUTION))
    for warning in results.warnings[:_WARNINGS_AT_MOST]:
        console.print(Text(f"warning: {visible(warning)}", style=CAUTION))
    more = len(results.warnings) - _WARNINGS_AT_MOST
    if more > 0:
        console.print(Text(f"warning: {more} more in the report", style=CAUTION))
    for sentence in closing_words(results):
        text = Text(visible(sentence.text), style=_SENTENCE_STYLES[sentence.kind])
        console.print(
            Padding(text, (0, 0, 1 if sentence.kind == "headline" else 0, 0), expand=False)
        )


def result_table(results: Results, eval_set: str, *, width: int = _WIDE) -> Table:
    """One row an arm: avg@k with standard error and interval, and what the arm spent.

    width: columns of the console; a narrow one does without whiskers, then without interval.
    """
    wide, medium = width >= _WIDE, width >= _MEDIUM
    rows = [row for row in results.rows if row.eval_set == eval_set]
    scale = scale_of(rows)
    table = _titled(_table_title(eval_set, rows))
    table.add_column("arm", min_width=22)
    table.add_column(f"avg@{rows[0].attempts} ± SE", justify="right", no_wrap=True)
    if medium:
        table.add_column("95% interval", justify="right", no_wrap=True)
    if wide:
        low, high = percent(scale.low)[:-3] + "%", percent(scale.high)[:-3] + "%"
        header = low + " " * (_WHISKER_COLUMNS - len(low) - len(high)) + high
        table.add_column(header, no_wrap=True, min_width=_WHISKER_COLUMNS)
    for counter in TABLE_COUNTERS:
        heading = _SHORT.get(counter, COUNTER_NAMES[counter])
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(visible(row.title)), Text(_score(row), style=HEADING)]
        if medium:
            cells.append(Text(f"{row.interval[0] * 100:.1f} – {row.interval[1] * 100:.1f}"))
        if wide:
            colour = TEACHER if row.evaluates == "teacher" else STUDENT
            cells.append(Text(whisker(row, scale), style=colour))
        cells += [Text(spent(name, row.spent.get(name, 0))) for name in TABLE_COUNTERS]
        table.add_row(*cells)
    return table


def hypothesis_table(
    results: Results, hypotheses: Sequence[HypothesisRow], *, width: int = _WIDE
) -> Table:
    """One row a claim: verdict, difference, interval, corrected p and detectable effect.

    width: columns of the console; a narrow one does without the detectable effect.
    """
    titles = results.titles()
    medium = width >= _MEDIUM
    table = _titled(f"hypotheses, on {hypotheses[0].eval_set}, in points")
    table.add_column("hypothesis", min_width=14 if medium else 4)
    table.add_column("claim", overflow="fold")
    headings = ("difference", "95% interval", "p (Holm)", *(("detectable",) if medium else ()))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for hypothesis in hypotheses:
        mark, style = _VERDICTS[hypothesis.verdict]
        for place, index in enumerate(hypothesis.claims):
            row = results.differences[index]
            words = f"{mark} {hypothesis.name} {hypothesis.verdict}" if place == 0 else ""
            cells = [
                Text(visible(words), style=style),
                Text(visible(_claim(row, titles))),
                Text(points(row.difference), style=HEADING if row.told_apart else ""),
                Text(f"{points(row.interval[0])} to {points(row.interval[1])}"),
                Text(bare_p_value(row.p_value_corrected)),
            ]
            if medium:
                cells.append(Text(f"{row.minimum_detectable * 100:.1f}"))
            table.add_row(*cells)
    return table


def _claim(row: DifferenceRow, titles: Mapping[str, str]) -> str:
    margin = "" if row.not_worse_by is None else f" ({row.not_worse_by * 100:.1f} behind at most)"
    return f"{titles[row.better]} − {titles[row.than]}{margin}"


def _on_other_sets(results: Results, primary: str) -> list[str]:
    """How the hypotheses came out on the other evaluation sets, a line each."""
    lines: dict[str, list[str]] = {}
    for row in results.hypotheses:
        if row.eval_set != primary:
            lines.setdefault(row.eval_set, []).append(f"{row.name} {row.verdict}")
    return [f"on {eval_set}: {', '.join(found)}" for eval_set, found in lines.items()]


def family_table(results: Results, rows: tuple[Row, ...]) -> Table:
    """Many arms by family: how many, from where to where, and the highest."""
    table = _titled(_table_title(rows[0].eval_set, rows))
    table.add_column("arms")
    for heading in ("number", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("the highest")
    for group in arm_groups(results, rows):
        best = max(group.rows, key=lambda row: row.avg_at_k)
        table.add_row(
            Text(visible(group.title)),
            Text(str(len(group.rows))),
            Text(percent(group.reach[0])),
            Text(percent(group.reach[1]), style=HEADING),
            Text(visible(best.title)),
        )
    return table


def _titled(title: str) -> Table:
    return Table(
        title=Text(visible(title), style=HEADING),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def difference_table(results: Results, rows: Sequence[DifferenceRow] | None = None) -> Table:
    """Contrasts (all, or these) with interval, corrected p-value and detectable effect."""
    titles = results.titles()
    table = _titled("differences, in points")
    several = len(results.eval_sets()) > 1
    table.add_column("comparison", overflow="fold")
    if several:
        table.add_column("on")
    for heading in ("difference", "95% interval", "p (Holm)", "detectable"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.differences if rows is None else rows:
        names = Text(visible(f"{titles[row.better]} − {titles[row.than]}"))
        cells = [names, *([Text(visible(row.eval_set))] if several else [])]
        cells += [
            Text(points(row.difference), style=HEADING if row.told_apart else ""),
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


def _table_title(eval_set: str, rows: Sequence[Row]) -> str:
    seeds = max(len(row.per_seed) for row in rows)
    over = f", {seeds} seeds" if seeds > 1 else ""
    return visible(f"{eval_set}: {rows[0].problems} problems × {rows[0].attempts} attempts{over}")


def _score(row: Row) -> str:
    if row.standard_error is None:
        return percent(row.avg_at_k)
    return f"{percent(row.avg_at_k)[:-1]} ± {row.standard_error * 100:.1f}"
