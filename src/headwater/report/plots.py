"""Small plots as SVG that takes its colours from the page, so that dark pages work.

Matplotlib draws with marker colours, which are then replaced by `currentColor` and by the
page's custom properties `--line-0` to `--line-6` and `--rule`. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.signal import savgol_filter

from headwater.report.curves import Line, Panel
from headwater.report.quantities import count, tiny
from headwater.visible import visible

COLOURS = 7
DASHES: tuple[str, ...] = ("", "5 2.5", "1.5 2", "7 2 1.5 2")  # SVG stroke-dasharray, in points

_INK, _RULE = "#010203", "#010204"
_LINE_MARKS = tuple(f"#0102{16 + index:02x}" for index in range(COLOURS))
_SMOOTHED_FROM = 24  # points of a line from which a running mean is drawn over it
_DRAWN_POINTS = 240  # of one line: more cannot be seen at this size
_SIZE_INCHES = (3.55, 2.15)
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _RULE,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
    "path.simplify": True,
}


def colour(style: int) -> str:
    """CSS colour of a line style."""
    return f"var(--line-{style % COLOURS})"


def dash(style: int) -> str:
    """SVG stroke-dasharray of a line style: the pattern changes when the colours are used up."""
    return DASHES[style // COLOURS % len(DASHES)]


def draw_panel(panel: Panel, identity: str) -> str:
    """SVG text of one panel; `identity` keeps its element ids apart from other plots'."""
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": identity}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        fill_axes(figure.add_subplot(), panel, _LINE_MARKS)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    label = visible(f"{panel.kind}: {panel.quantity.name} over steps")
    return _for_the_page(buffer.getvalue(), identity, label)


def fill_axes(axes: Axes, panel: Panel, colours: Sequence[str]) -> None:
    """Draw one panel's lines on axes.

    A strong line is the mean over seeds, smoothed where there are many steps; the shade around
    it reaches from the lowest seed to the highest. Faint is a single seed as logged.
    """
    for line in panel.lines:
        _draw_line(axes, line, colours[line.style % COLOURS])
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=4)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.quantity.unit == "share":
        places = decimals([100 * tick for tick in axes.get_yticks()])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{places}%}"))
    elif axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    elif max(map(abs, axes.get_ylim())) < 1e-3:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tiny(value)))
    axes.set_xlabel("step", loc="right", labelpad=1)


def _draw_line(axes: Axes, line: Line, mark: str) -> None:
    pattern = tuple(float(part) for part in dash(line.style).split())
    style = (0, pattern) if pattern else "solid"
    steps, mean = seed_mean(line)
    smoothed = smooth(mean)
    if len(line.runs) > 1:
        band_steps, low, high = seed_band(line)
        (at, lowest), (_, highest) = thinned(band_steps, low), thinned(band_steps, high)
        axes.fill_between(at, lowest, highest, color=mark, alpha=0.2, linewidth=0)
    elif len(mean) >= _SMOOTHED_FROM:
        axes.plot(*thinned(steps, mean), color=mark, alpha=0.28, linewidth=0.7)
    dot = "o" if len(steps) == 1 else None
    axes.plot(
        *thinned(steps, smoothed), color=mark, linewidth=1.7, linestyle=style, marker=dot, ms=3.5
    )


def seed_band(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that every seed logged, and the lowest and highest seed, each smoothed for itself."""
    steps, _ = seed_mean(line)
    by_seed = [dict(zip(*run, strict=True)) for run in line.runs]
    smoothed_SN = np.array([smooth(np.array([one[int(n)] for n in steps])) for one in by_seed])
    return steps, smoothed_SN.min(axis=0), smoothed_SN.max(axis=0)


def seed_mean(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every seed logged, and the mean over seeds at each of them."""
    shared = set(line.runs[0][0]).intersection(*(steps for steps, _ in line.runs))
    by_seed = [dict(zip(*run, strict=True)) for run in line.runs]
    steps = np.array(sorted(shared), dtype=np.int64)
    return steps, np.array([np.mean([one[int(step)] for one in by_seed]) for step in steps])


def smooth(values: np.ndarray) -> np.ndarray:
    """A long series smoothed over about an eighth of it; a short one is unchanged.

    Each value is that of the straight line fitted to its window (Savitzky and Golay); inside
    this is the running mean, and at the ends it neither lags nor follows the last value. It
    never leaves the range of the values: a share stays between 0 and 1.
    """
    if len(values) < _SMOOTHED_FROM:
        return values
    window = 2 * max(1, len(values) // 16) + 1
    smoothed = savgol_filter(values, window, polyorder=1, mode="interp")
    return np.asarray(np.clip(smoothed, values.min(), values.max()))


def decimals(ticks: Iterable[float]) -> int:
    """Decimals, two at most, that tell ticks apart and write each as it is.

    >>> decimals([97.5, 98.0, 98.5]), decimals([0.0, 25.0]), decimals([0.0, 0.25])
    (1, 0, 2)
    """
    shown = list(ticks)
    exact = (
        places for places in (0, 1) if all(abs(tick - round(tick, places)) < 1e-6 for tick in shown)
    )
    return next(exact, 2)


def thinned(steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[2, n] steps and values as means of equal stretches, n at most `_DRAWN_POINTS`."""
    both = np.array([steps, values], dtype=np.float64)
    stretch = -(-both.shape[1] // _DRAWN_POINTS)
    if stretch == 1:
        return both
    starts = np.arange(0, both.shape[1], stretch)
    return np.add.reduceat(both, starts, axis=1) / np.diff([*starts, both.shape[1]])


def _for_the_page(svg: str, identity: str, label: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'="[^"]*"', lambda found: _shortened(found.group(0)), svg)
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'((?:xlink:)?href=")#', rf"\1#{identity}-", svg)
    svg = svg.replace("url(#", f"url(#{identity}-")
    svg = _compact(svg)
    svg = re.sub(r"font(-family)?: [^;\"]*;?", lambda found: _keep_size(found.group(0)), svg)
    svg = svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    for index, mark in enumerate(_LINE_MARKS):
        svg = svg.replace(mark, f"var(--line-{index})")
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _shortened(attribute: str) -> str:
    """An attribute with coordinates to a tenth of a point; text between tags stays whole."""
    return re.sub(r"(\d\.\d)\d+", r"\1", attribute)


def _compact(svg: str) -> str:
    """The same picture in fewer characters: no ids that nothing refers to, no empty groups."""
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(
        r' id="([^"]*)"', lambda found: found.group(0) if found.group(1) in referred else "", svg
    )
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    svg = re.sub(r"\s*\n\s*(?=[LMzCQ\"])", "", svg)
    svg = re.sub(r">\s+<", "><", svg)
    return re.sub(r"<g/>|<defs></defs>", "", svg)


def _keep_size(declaration: str) -> str:
    """Of matplotlib's font declarations only the size stays; the page chooses the family."""
    size = re.search(r"([\d.]+)px", declaration)
    return f"font-size: {size.group(1)}px;" if size else ""
