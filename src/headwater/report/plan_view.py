"""How a plan reads in a terminal: counts of stages and arms, then devices, time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from headwater.report.quantities import byte_count, count, duration, hours, spent
from headwater.terminal import CAUTION, HEADING
from headwater.visible import one_line, visible

if TYPE_CHECKING:
    from headwater.ledger.spending import Spending
    from headwater.workflow.devices import DeviceNeed
    from headwater.workflow.estimate import Plan, StageEstimate
    from headwater.workflow.stage_groups import StageGroup

# Counter of the ledger -> its heading where many stand side by side.
_PLANNED = {
    "labels": "labels",
    "verifier_calls": "calls",
    "generated_tokens": "generated",
    "teacher_scored_tokens": "scored",
    "trained_tokens": "trained",
    "updates": "updates",
    "flops": "FLOPs",
    "seconds": "time",
    "peak_memory_bytes": "memory",
}
_PLANNED_OF_A_STAGE = ("labels", "verifier_calls", "generated_tokens", "updates", "seconds")
# More stages than this are shown in groups, seeds and arms together.
_MOST_ROWS = 40
_GIB = 2.0**30
# Columns of a terminal from which all of the counters fit side by side.
_WIDE = 110
_NAME = 16  # characters that a stage's name has at least
_NARROW = ("labels", "generated_tokens", "updates", "seconds")
# Heading -> parts of the seconds that it adds up.
_PARTS = {
    "sample": ("sampling",),
    "train": ("training",),
    "score": ("scoring",),
    "comm.": ("communication",),
    "verify": ("verifying",),
    "push": ("pushing",),
    "other": ("other",),
    "tail": ("tail",),
    "idle": ("idle",),
}
_NARROW_PARTS = {
    "sample": ("sampling",),
    "train": ("training", "scoring"),
    "comm.": ("communication",),
    "verify": ("verifying",),
    "other": ("pushing", "other"),
    "tail": ("tail",),
    "idle": ("idle",),
}
# Heading -> fields of DeviceMemory that it adds up: held all along, to sample, to train or score.
_MEMORY = {
    "masters": ("masters",),
    "Adam": ("moments",),
    "grads": ("gradients",),
    "beside": ("beside",),
    "weights": ("sampling_weights", "packed_weights"),
    "KV": ("kv_cache", "recorded"),
    "draws": ("drawing",),
    "gather": ("training_weights", "unreduced_gradients"),
    "layers": ("activations",),
    "head": ("head",),
    "host": ("host",),
}
_NARROW_MEMORY = {
    "state": ("masters", "moments", "gradients"),
    "beside": ("beside",),
    "weights": ("sampling_weights", "packed_weights"),
    "KV": ("kv_cache", "recorded", "drawing"),
    "gather": ("training_weights", "unreduced_gradients"),
    "layers": ("activations", "head"),
    "host": ("host",),
}


def print_plan(console: Console, plan: Plan) -> None:
    """Distinct stages, what each arm uses, devices, the totals and the warnings."""
    from headwater.workflow.stage_groups import grouped

    narrow = console.width < _WIDE
    many = narrow or len(plan.stages) > _MOST_ROWS
    groups = grouped(plan.stages)
    console.print(_stage_groups(plan, groups, narrow=narrow) if many else _stages(plan))
    console.print(_arms(plan, together=many, narrow=narrow))
    to_do = grouped(stage for stage in plan.stages if not stage.cached)
    if plan.assumptions is not None:
        for table in (
            _devices(plan, to_do),
            _time(to_do, narrow=narrow),
            _memory(to_do, narrow=narrow),
        ):
            console.print(table)
        console.print(Text(visible(side_by_side(plan))))
        console.print(Text(plan.assumptions))
    for warning in plan.warnings:
        console.print(Text(f"warning: {one_line(warning)}", style=CAUTION))
    console.print(
        f"About {duration(plan.to_do.seconds)} to go; nothing was trained. It needs up to "
        f"{byte_count(plan.disk_bytes)} on disk. Tokens are upper bounds "
        "(each response as long as it may get, unless --mean-response says less); FLOPs, time and "
        "memory are orders of magnitude. Budgets limit training; evaluation's labels are its own."
    )


def side_by_side(plan: Plan) -> str:
    """The cluster's schedule in words, and the chain that no number of devices shortens."""
    cluster, found = plan.cluster, plan.cluster.schedule
    stages = {stage.fingerprint: stage for stage in plan.stages}
    path = " -> ".join(
        f"{_name(stages[name])} ({hours(_hours_of(stages[name]))} h)" for name in found.longest_path
    )
    return (
        f"{cluster.devices} GPUs in nodes of {cluster.per_node}: {hours(found.seconds / 3600)} h "
        f"with independent stages side by side (GPUs busy {found.busy_share:.0%}). The longest "
        f"path alone takes {hours(found.longest_path_seconds / 3600)} h: {path or 'nothing'}"
    )


def _hours_of(stage: StageEstimate) -> float:
    return stage.spending.seconds / 3600


def _name(stage: StageEstimate | StageGroup) -> str:
    return " ".join((stage.kind, stage.model, *([stage.pool] if stage.pool else [])))


def _stages(plan: Plan) -> Table:
    shown = {name: _PLANNED[name] for name in _PLANNED_OF_A_STAGE}
    table = _table("stage", "seed", "used by", "", *shown.values(), right=len(shown))
    table.title = Text(visible(f"{plan.name}: {len(plan.stages)} distinct stages"))
    for stage in plan.stages:
        users = ", ".join(stage.arms) or "base models"
        state = "cached" if stage.cached else "shared" if stage.shared else ""
        amounts = _amounts(stage.spending, shown)
        names = Text(visible(_name(stage))), str(stage.seed), Text(visible(users)), state
        table.add_row(*names, *amounts)
    return table


def _stage_groups(plan: Plan, groups: Iterable[StageGroup], *, narrow: bool) -> Table:
    chosen = _NARROW if narrow else _PLANNED_OF_A_STAGE
    shown = {name: _PLANNED[name] for name in chosen}
    counted = ("stages",) if narrow else ("stages", "seeds", "arms", "cached")
    table = _table("stage", *counted, *shown.values(), right=len(counted) + len(shown))
    alike = "those of a kind together"
    table.title = Text(visible(f"{plan.name}: {len(plan.stages)} distinct stages, {alike}"))
    for group in groups:
        if group.kind == "source":  # takes nothing
            continue
        counts = [str(len(items)) if items else "-" for items in (group.seeds, group.arms)]
        cells = [str(group.stages), *counts, str(group.cached) if group.cached else ""]
        amounts = _amounts(group.spending, shown)
        table.add_row(Text(visible(_name(group))), *cells[: len(counted)], *amounts)
    return table


def _arms(plan: Plan, *, together: bool, narrow: bool) -> Table:
    """together: one row for the seeds of an arm that take the same."""
    shown = {name: _PLANNED[name] for name in _NARROW} if narrow else _PLANNED
    table = _table("what it takes", "seed", *shown.values(), right=len(shown))
    each = ", a row for each of its seeds" if together else ""
    table.title = f"each arm with its shared stages{each}; then the whole run, each stage once"
    rows: dict[tuple[str, Spending, int | None], list[str]] = {}
    for arm in plan.arms:
        alike = rows.setdefault((arm.arm, arm.spending, None if together else arm.seed), [])
        alike.append(str(arm.seed))
    for (name, spending, _), seeds in rows.items():
        table.add_row(Text(visible(name)), ", ".join(seeds), *_amounts(spending, shown))
    table.add_section()
    for name, spending in (
        ("all training", plan.training),
        ("all evaluation", plan.evaluation),
        ("still to do", plan.to_do),
    ):
        table.add_row(name, "", *_amounts(spending, shown))
    return table


def _devices(plan: Plan, groups: Iterable[StageGroup]) -> Table:
    """GPUs, memory, speed and hours of the stages still to do."""
    columns = ("n", "ranks", "servers", "GiB", "tok/s", "h", "GPU-h")
    table = _table("still to do", *columns, right=len(columns))
    table.title = "ranks (one GPU each) that share each of n stages (!: it does not fit)"
    for group in groups:
        need = group.largest
        if need is None:
            continue
        table.add_row(
            Text(visible(_name(group))),
            str(group.stages),
            f"{need.ranks}{'' if need.fits else '!'}",
            str(need.servers) if need.servers else "-",
            _gib(need.bytes_per_device),
            count(need.tokens_per_second),
            hours(group.spending.seconds / 3600),
            hours(group.device_hours),
        )
    table.add_section()
    totals = (hours(plan.to_do.seconds / 3600), hours(plan.device_hours))
    table.add_row("all, side by side", "", "", "", "", "", *totals)
    return table


def _time(groups: Iterable[StageGroup], *, narrow: bool) -> Table:
    columns = _NARROW_PARTS if narrow else _PARTS
    table = _table("still to do", *columns, right=len(columns))
    table.title = "% of the time (tail: waiting for the longest response; idle: for other ranks)"
    for name, need in _largest(groups).items():
        shares = need.seconds.shares()
        sums = (sum(shares[part] for part in column) for column in columns.values())
        table.add_row(
            Text(visible(name)), *(f"{100 * share:.0f}" if share else "-" for share in sums)
        )
    return table


def _memory(groups: Iterable[StageGroup], *, narrow: bool) -> Table:
    """Held all along, then what sampling and what training adds; not at the same time."""
    columns = _NARROW_MEMORY if narrow else _MEMORY
    table = _table("still to do", *columns, right=len(columns))
    table.title = "GiB of the fullest rank: held all along | to sample | to train or score"
    for name, need in _largest(groups).items():
        parts = need.memory.as_dict()
        sums = (_gib(sum(parts[part] for part in column)) for column in columns.values())
        table.add_row(Text(visible(name)), *sums)
    return table


def _largest(groups: Iterable[StageGroup]) -> dict[str, DeviceNeed]:
    """By kind and model, the need that is longest: pools make little difference."""
    found: dict[str, DeviceNeed] = {}
    for group in groups:
        name, need = f"{group.kind} {group.model}", group.largest
        if need is not None and (
            name not in found or need.seconds.total > found[name].seconds.total
        ):
            found[name] = need
    return found


def _gib(amount: float) -> str:
    if not amount:
        return "-"
    return f"{amount / _GIB:.1f}" if amount < 99.95 * _GIB else f"{amount / _GIB:,.0f}"


def _amounts(spending: Spending, names: Iterable[str]) -> list[str]:
    amounts = spending.as_dict()
    return [spent(name, amounts[name]) for name in names]


def _table(*columns: str, right: int = 0) -> Table:
    """right: how many of the last columns hold numbers, which stand to the right."""
    table = Table(
        title_justify="left", title_style=HEADING, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(columns):
        numbers = index >= len(columns) - right
        side: JustifyMethod = "right" if numbers else "left"
        least = _NAME if right and not index else None
        table.add_column(column, overflow="fold", justify=side, min_width=least)
    return table
