"""report.html: one file that opens offline and says what a run found.

There is no script in it and nothing is fetched. Every piece of text that comes from a recipe,
a data set or a model is escaped by the template engine, with control characters visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from headwater.report import quantities
from headwater.report.curves import KindCurves, Panel, learning_curves
from headwater.report.plots import colour, dash, draw_panel
from headwater.report.results import Results, Row, StageRow, read_results
from headwater.report.samples import (
    ReadRollout,
    draw_lots,
    rollouts_of_arm,
    verdict_mark,
)
from headwater.report.scale import Scale, scale_of
from headwater.report.visible import excerpt, visible
from headwater.report.words import best_arm, closing_words
from headwater.types import Verdict

PAGE_FILE = "report.html"
RECIPE_FILE = "recipe.yaml"

_SAMPLES_EACH = 2  # correct and other rollouts shown for an arm
_PROMPT_LIMIT, _RESPONSE_LIMIT = 1_500, 3_000
_WRONG = (Verdict.INCORRECT.value, Verdict.UNPARSEABLE.value, Verdict.TIMEOUT.value)


@dataclass(frozen=True, slots=True)
class ResultTable:
    """The rows of one evaluation set and their common axis; `base` is the untrained student's."""

    eval_set: str
    rows: tuple[Row, ...]
    scale: Scale
    base: Row | None

    @property
    def spends(self) -> bool:
        """Whether any row knows what it spent."""
        return any(row.spent for row in self.rows)


@dataclass(frozen=True, slots=True)
class ArmSamples:
    """Rollouts to read of one arm's model."""

    arm: str
    title: str
    evaluates: str
    rollouts: tuple[ReadRollout, ...]


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


def build_page(run_dir: Path) -> Path:
    """Write RUN/report.html from the run folder's results, metrics and rollouts.

    Raises InputError when results.json, a metrics file or a rollouts file cannot be read.
    """
    results = read_results(run_dir)
    recipe = run_dir / RECIPE_FILE
    page = render_page(
        results,
        curves=learning_curves(results, run_dir),
        samples=_samples(results, run_dir),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )
    path = run_dir / PAGE_FILE
    beside = path.with_suffix(".html.part")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)
    return path


def render_page(
    results: Results, *, curves: list[KindCurves], samples: list[ArmSamples], recipe: str
) -> str:
    """The page as text; pure."""
    return (
        _environment()
        .get_template("page.html")
        .render(
            results=results,
            titles=results.titles(),
            best=best_arm(results),
            words=closing_words(results),
            tables=[_table(results, name) for name in results.eval_sets()],
            counters=quantities.TABLE_COUNTERS,
            all_counters=_counters_used(results),
            curves=curves,
            samples=samples,
            stage_groups=_stage_groups(results),
            unshared_seconds=_unshared_seconds(results),
            recipe=recipe,
        )
    )


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


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
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
    }
    environment.globals |= {
        "style_sheet": Markup(_template("page.css")),
        "counter_names": quantities.COUNTER_NAMES,
        "spent": lambda counter, amounts: quantities.spent(counter, amounts.get(counter, 0)),
        "panel_svg": _panel_svg,
        "colour": colour,
        "stage_name": quantities.stage_name,
        "dash": dash,
        "verdict_mark": lambda rollout: verdict_mark(rollout)[0],
        "prompt_limit": _PROMPT_LIMIT,
        "response_limit": _RESPONSE_LIMIT,
    }
    return environment


def _template(name: str) -> str:
    return resources.files("headwater.report").joinpath(name).read_text(encoding="utf-8")


def _panel_svg(panel: Panel, identity: str) -> Markup:
    return Markup(draw_panel(panel, identity))


def _table(results: Results, eval_set: str) -> ResultTable:
    rows = tuple(row for row in results.rows if row.eval_set == eval_set)
    base = [row for row in rows if row.evaluates == "student" and not row.chain]
    return ResultTable(eval_set, rows, scale_of(rows), base[0] if base else None)


def _counters_used(results: Results) -> list[str]:
    ledger = results.ledger
    return [
        name
        for name in quantities.COUNTER_NAMES
        if any(part.get(name) for part in (ledger.physical, ledger.training, ledger.evaluation))
    ]


def _samples(results: Results, run_dir: Path) -> list[ArmSamples]:
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


def _stage_groups(results: Results) -> list[StageGroup]:
    groups: dict[tuple[Any, ...], list[StageRow]] = {}
    nth: dict[tuple[Any, ...], int] = {}
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


def _unshared_seconds(results: Results) -> float:
    """What training would have taken had every arm run all of its stages for itself."""
    return sum(
        stage.spent.get("seconds", 0.0) * max(1, len(stage.used_by))
        for stage in results.stages
        if stage.kind != "evaluate"
    )
