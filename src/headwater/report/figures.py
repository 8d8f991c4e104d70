"""Figures for a paper or a talk: RUN/figures/*.svg and *.png, on a light ground."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from headwater.report.curves import KindCurves, learning_curves
from headwater.report.map_view import MapGrid, grid_of
from headwater.report.plots import COLOURS, dash, fill_axes
from headwater.report.quantities import count, percent, points
from headwater.report.results import DifferenceRow, HypothesisRow, MapCell, Results, Row
from headwater.report.study_tables import claims_of, ladder
from headwater.report.views import arm_groups
from headwater.visible import visible

FIGURES_FOLDER = "figures"
#: The light theme of page.css.
LINES = ("#0072b2", "#d55e00", "#00875f", "#b3508c", "#b88600", "#3f9fd6", "#5b5750")
_INK, _MUTED, _RULE, _PAPER = "#1d1c1a", "#66625a", "#dfdbd1", "#ffffff"
_STUDENT, _TEACHER = "#0a63a6", "#b4530f"
_VERDICTS = {"supported": "#1a7045", "refuted": "#b3261e", "undecided": _MUTED}
_MARKERS = {"supported": "o", "refuted": "X", "undecided": "D"}
_DOTS_PER_INCH = 200
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headwater",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
}


def write_figures(results: Results, run_dir: Path) -> tuple[Path, ...]:
    """Write every figure that has something to show, as SVG and PNG; earlier ones are removed.

    Raises InputError when a metrics file cannot be read.
    """
    folder = run_dir / FIGURES_FOLDER
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    written: list[Path] = []
    with mpl.rc_context(_SETTINGS):
        for name, figure in _figures(results, run_dir):
            written += _saved(figure, folder / name)
    return tuple(written)


def _saved(figure: Figure, path: Path) -> tuple[Path, Path]:
    vector, pixels = path.with_suffix(".svg"), path.with_suffix(".png")
    figure.savefig(vector, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    figure.savefig(pixels, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return vector, pixels


def _figures(results: Results, run_dir: Path) -> Iterable[tuple[str, Figure]]:
    titles = results.titles()
    first = results.eval_sets()[0] if results.rows else ""
    claims = list(claims_of(results, first))
    if claims:
        yield "hypotheses", _forest(claims, titles, first)
    rungs = ladder(results)
    if rungs:
        yield "density-ladder", _dots([(rung.signal, rung.row) for rung in rungs], {}, first)
    if results.map is not None and results.map.cells:
        yield "map", _map(grid_of(results.map), results)
    groups = arm_groups(results, tuple(row for row in results.rows if row.eval_set == first))
    entries: list[tuple[str, Row]] = []
    heads: dict[int, str] = {}
    for group in groups:
        if group.folded:
            continue
        heads[len(entries)] = group.title
        entries += [(row.title, row) for row in group.rows]
    if entries:
        yield "arms", _dots(entries, heads, first)
    for kind in learning_curves(results, run_dir):
        name = "".join(c if c.isalnum() or c == "_" else "-" for c in kind.kind)
        yield f"curves-{name}", _curves(kind)


# --- intervals -----------------------------------------------------------------------------------


def _forest(
    claims: Sequence[tuple[HypothesisRow, DifferenceRow]], titles: Mapping[str, str], eval_set: str
) -> Figure:
    figure, axes = _canvas(7.2, 0.42 * len(claims) + 0.9)
    axes.axvline(0.0, color=_MUTED, linewidth=0.9)
    for place, (_, row) in enumerate(claims):
        colour = _VERDICTS[row.verdict]
        low, high = (100 * bound for bound in row.interval)
        axes.plot([low, high], [place, place], color=colour, linewidth=2.0)
        axes.plot([100 * row.difference], [place], _MARKERS[row.verdict], color=colour, ms=5.5)
    names = [
        f"{_folded(hypothesis.name, 20)}  {_folded(titles[row.better])}\n"
        f"over {_folded(titles[row.than])}"
        for hypothesis, row in claims
    ]
    _label_rows(axes, names)
    for label in axes.get_yticklabels():
        label.set_fontsize(7.0)
    axes.set_xlabel(f"difference in avg@k on {_folded(eval_set)}, points, with 95% interval")
    for verdict, marker in _MARKERS.items():
        axes.plot([], [], marker, color=_VERDICTS[verdict], ms=5.5, label=verdict)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=8.0)
    return figure


def _dots(entries: Sequence[tuple[str, Row]], heads: Mapping[int, str], eval_set: str) -> Figure:
    figure, axes = _canvas(7.2, 0.21 * (len(entries) + len(heads)) + 0.8)
    places, names, place = [], [], 0
    for index, (name, row) in enumerate(entries):
        if heads.get(index):
            places.append(place)
            names.append(_folded(heads[index].upper()))
            place += 1
        colour = _TEACHER if row.evaluates == "teacher" else _STUDENT
        low, high = (100 * bound for bound in row.interval)
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8)
        marker = "D" if row.evaluates == "teacher" else "o"
        axes.plot([100 * row.avg_at_k], [place], marker, color=colour, ms=4.5)
        if len(row.per_seed) > 1:
            seeds = [100 * mean for mean in row.per_seed]
            axes.plot(seeds, [place + 0.28] * len(seeds), "|", color=colour, ms=3.5, alpha=0.8)
        places.append(place)
        names.append(_folded(name, 78))
        place += 1
    _label_rows(axes, names, places)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel(f"avg@{entries[0][1].attempts} on {_folded(eval_set)}, with 95% interval")
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=_PAPER)
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    return figure, axes


def _label_rows(axes: Axes, names: Sequence[str], places: Sequence[int] | None = None) -> None:
    where = range(len(names)) if places is None else places
    axes.set_yticks(list(where), labels=list(names))
    axes.set_ylim(max(where) + 0.6, -0.6)


def _folded(title: str, limit: int = 62) -> str:
    """A title on one line, no longer than fits beside a plot."""
    shown = visible(title[: limit + 1]).replace("\n", " ")
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


# --- the map and the curves ----------------------------------------------------------------------


def _map(grid: MapGrid, results: Results) -> Figure:
    assert results.map is not None
    width = 1.6 + 1.05 * len(grid.labels)
    figure = Figure(figsize=(width, 0.62 * len(grid.lines) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    for y, line in enumerate(grid.lines):
        for x, cell in enumerate(line.cells):
            if cell is not None:
                _draw_cell(axes, x, y, cell, grid.strength(cell))
    axes.set_xlim(-0.5, len(grid.labels) - 0.5)
    axes.set_ylim(len(grid.lines) - 0.5, -0.5)
    axes.set_xticks(range(len(grid.labels)), labels=[count(one) for one in grid.labels])
    students = [f"{_folded(one.student, 30)}\n{percent(one.base_rate)}" for one in grid.lines]
    axes.set_yticks(range(len(students)), labels=students)
    axes.set_xlabel("labels")
    axes.set_ylabel("student, and its avg@k untrained")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _draw_cell(axes: Axes, x: int, y: int, cell: MapCell, strength: int) -> None:
    colour = _STUDENT if cell.outcome == "wins" else _TEACHER
    alpha = 0.0 if cell.outcome == "ties" else 0.1 + 0.1 * strength
    box: dict[str, Any] = {"facecolor": (colour, alpha), "edgecolor": _RULE, "linewidth": 0.8}
    axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, **box))
    axes.text(x, y - 0.12, points(cell.difference), ha="center", va="center", fontweight="bold")
    interval = f"{points(cell.interval[0])} to {points(cell.interval[1])}"
    axes.text(x, y + 0.12, interval, ha="center", va="center", fontsize=6.5)
    axes.text(x, y + 0.32, cell.outcome, ha="center", va="center", fontsize=6.5, color=_MUTED)


def _curves(kind: KindCurves) -> Figure:
    columns = min(3, len(kind.leading))
    rows = -(-len(kind.leading) // columns)
    legend = 0.17 * len(kind.legend)
    figure = Figure(figsize=(3.1 * columns, 2.2 * rows + legend), layout="constrained")
    for place, panel in enumerate(kind.leading, start=1):
        axes = figure.add_subplot(rows, columns, place)
        fill_axes(axes, panel, LINES)
        unit = f" ({panel.quantity.unit})" if panel.quantity.unit not in ("", "share") else ""
        axes.set_title(f"{panel.quantity.name}{unit}", loc="left", fontsize=8.5)
    handles = [_key(label, style) for label, style in kind.legend]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=7.0)
    return figure


def _key(label: str, style: int) -> Line2D:
    pattern = tuple(float(part) for part in dash(style).split())
    return Line2D(
        [],
        [],
        color=LINES[style % COLOURS],
        linewidth=1.7,
        linestyle=(0, pattern) if pattern else "solid",
        label=_folded(label, 78),
    )
