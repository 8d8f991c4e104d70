"""report.html: one file that opens offline and says what a run found.

There is no script in it and nothing is fetched. Every piece of text that comes from a recipe,
a data set or a model is escaped by the template engine, with control characters visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from headwater.report import diagnostics, quantities, study_tables, tables
from headwater.report.curves import KindCurves, Panel, learning_curves
from headwater.report.map_view import grid_of, map_words
from headwater.report.paper_tables import paper_tables
from headwater.report.plots import colour, dash, draw_panel
from headwater.report.results import DifferenceRow, DynamicsRow, Results, Row, read_results
from headwater.report.samples import ReadRollout, verdict_mark
from headwater.report.scale import scale_of
from headwater.report.side_by_side import Answered, side_by_side
from headwater.report.views import (
    ArmGroup,
    ArmSamples,
    ResultTable,
    arm_samples,
    judged,
    probe_views,
    result_table,
    stage_groups,
    unclaimed,
)
from headwater.report.words import best_arm, closing_words
from headwater.storage import write_whole
from headwater.types import Verdict
from headwater.visible import excerpt, visible

PAGE_FILE = "report.html"
RECIPE_FILE = "recipe.yaml"

_PROMPT_LIMIT, _RESPONSE_LIMIT = 1_500, 3_000
_ALARMS_SHOWN = _WARNINGS_SHOWN = 6
_SAMPLES_SHOWN = 12  # arms whose answers are listed before the rest is folded away
_STAGES_SHOWN = 24  # lines of the table of dynamics before only those of claims are shown


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read from the run folder beside results.json."""

    curves: list[KindCurves]
    samples: list[ArmSamples]
    answered: tuple[Answered, ...] = ()
    recipe: str = ""


def build_page(run_dir: Path) -> Path:
    """Write RUN/report.html from the run folder's results, metrics and rollouts.

    Raises InputError when results.json, a metrics file or a rollouts file cannot be read.
    """
    results = read_results(run_dir)
    recipe = run_dir / RECIPE_FILE
    arms = diagnostics.claimed_arms(results)
    reading = Reading(
        curves=learning_curves(results, run_dir),
        samples=arm_samples(results, run_dir),
        answered=side_by_side(results, run_dir, arms) if results.hypotheses else (),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )
    page = render_page(results, reading)
    path = run_dir / PAGE_FILE
    write_whole(path, page)
    return path


def render_page(results: Results, reading: Reading) -> str:
    """The page as text; pure."""
    context = {
        **_study(results),
        **_arms(results),
        **_diagnostics(results),
        "results": results,
        "titles": results.titles(),
        "words": closing_words(results),
        "curves": reading.curves,
        "samples": reading.samples,
        "samples_shown": _SAMPLES_SHOWN,
        "warnings_shown": _WARNINGS_SHOWN,
        "answered": reading.answered,
        "recipe": reading.recipe,
    }
    return _environment(results).get_template("page.html").render(context)


def _study(results: Results) -> dict[str, Any]:
    """What is claimed, mapped and tabulated."""
    one_run = study_tables.one_run_table(results)
    rungs = study_tables.ladder(results)
    scale = scale_of(rung.row for rung in rungs)
    rows = tuple(rung.row for rung in rungs)
    return {
        "judged": judged(results),
        "one_run": one_run if one_run.rows else None,
        "unclaimed": unclaimed(results),
        "accounts": study_tables.accounts_table(results),
        "paper": paper_tables(results),
        "rungs": rungs,
        "rung_scale": scale,
        "rung_table": ResultTable("", rows, scale, None, (ArmGroup("", False, rows),)),
        "grid": grid_of(results.map) if results.map and results.map.cells else None,
        "map_words": map_words(results),
    }


def _arms(results: Results) -> dict[str, Any]:
    """Arms, what they spent and what they share."""
    return {
        "best": best_arm(results),
        "tables": [result_table(results, name) for name in results.eval_sets()],
        "counters": quantities.TABLE_COUNTERS,
        "all_counters": _counters_used(results),
        "stage_groups": stage_groups(results),
        "shared_kinds": study_tables.sharing(results),
        "shared_total": study_tables.total_sharing(results),
    }


def _diagnostics(results: Results) -> dict[str, Any]:
    """C1, C2 and the dynamics: first what the claims rest on, then the rest."""
    arms = set(diagnostics.claimed_arms(results))
    if len(results.dynamics) <= _STAGES_SHOWN:
        arms |= {arm for row in results.dynamics for arm in row.used_by}
    alerted = {alert.stage for alert in results.alerts}
    first = [
        row
        for row in results.dynamics
        if row.alarms or alerted & set(row.artifacts) or _leads(row, arms)
    ]
    rest = [row for row in results.dynamics if row not in first]
    return {
        "alarms": diagnostics.alarms(results),
        "alarms_shown": _ALARMS_SHOWN,
        "gains": [diagnostics.gains_table(results, name) for name in results.eval_sets()],
        "probes": probe_views(results),
        "dynamics": {
            "first": diagnostics.dynamics_table(results, first),
            "rest": diagnostics.dynamics_table(results, rest),
        },
    }


def _leads(row: DynamicsRow, arms: set[str]) -> bool:
    """Whether a stage samples from the model it trains, for one of these arms."""
    return row.sampler_gap is not None and bool(arms & set(row.used_by))


def chain_by_model(chain: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A chain as (model, its stages) for each stretch of stages of the same model.

    >>> chain_by_model(["teacher: grpo(labels)", "student: warmup(labels)", "student: opd(labels)"])
    [('teacher', ['grpo(labels)']), ('student', ['warmup(labels)', 'opd(labels)'])]
    """
    stretches: list[tuple[str, list[str]]] = []
    for part in chain:
        model, _, stage = part.rpartition(": ")
        if not stretches or stretches[-1][0] != model:
            stretches.append((model, []))
        stretches[-1][1].append(quantities.stage_name(model, stage))
    return stretches


def _environment(results: Results) -> Environment:
    rows = study_tables.students_of(results)

    def sources_of(difference: DifferenceRow) -> str:
        pair = (
            rows.get((arm, difference.eval_set)) for arm in (difference.better, difference.than)
        )
        return "; ".join(_evaluations(row) for row in pair if row is not None)

    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(excerpt(value)) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": quantities.percent,
        "points": quantities.points,
        "bare_p_value": quantities.bare_p_value,
        "count": quantities.count,
        "duration": quantities.duration,
        "excerpt": excerpt,
        "by_model": chain_by_model,
        "evaluations": _evaluations,
    }
    environment.globals |= {
        "style_sheet": Markup(_template("page.css")),  # noqa: S704 - a file of ours
        "counter_names": quantities.COUNTER_NAMES,
        "spent": lambda counter, amounts: quantities.spent(counter, amounts.get(counter, 0)),
        "panel_svg": _panel_svg,
        "colour": colour,
        "stage_name": quantities.stage_name,
        "dash": dash,
        "sources_of": sources_of,
        "cell_parts": tables.cell_parts,
        "is_bold": lambda cell: isinstance(cell, tables.Gap) and cell.told_apart,
        "cell_lines": tables.cell_lines,
        "is_matched": lambda cell: isinstance(cell, tables.Amounts) and cell.matched,
        "verdict_mark": lambda rollout: verdict_mark(rollout)[0],
        "verdict_class": _verdict_class,
        "prompt_limit": _PROMPT_LIMIT,
        "response_limit": _RESPONSE_LIMIT,
    }
    return environment


def _verdict_class(rollout: ReadRollout) -> str:
    """A class of the style sheet, whatever a file calls its verdict."""
    return rollout.verdict if rollout.verdict in set(Verdict) else "none"


def _evaluations(row: Row) -> str:
    """Where a row's numbers come from, for its title attribute."""
    return f"from {', '.join(row.evaluations)}" if row.evaluations else ""


def _template(name: str) -> str:
    return resources.files("headwater.report").joinpath(name).read_text(encoding="utf-8")


def _panel_svg(panel: Panel, identity: str) -> Markup:
    return Markup(draw_panel(panel, identity))  # noqa: S704 - numbers, and a label it escapes


def _counters_used(results: Results) -> list[str]:
    ledger = results.ledger
    return [
        name
        for name in quantities.COUNTER_NAMES
        if any(part.get(name) for part in (ledger.physical, ledger.training, ledger.evaluation))
    ]
