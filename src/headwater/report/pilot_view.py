"""How a pilot reads in a terminal: what was measured, the advice and its evidence, the costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.report.quantities import percent, points, spent
from headwater.visible import visible

if TYPE_CHECKING:
    from headwater.evals.base_rates import Share
    from headwater.workflow.advice import Verdict
    from headwater.workflow.estimate import Plan
    from headwater.workflow.pilot import PilotOutcome
    from headwater.workflow.pilot_study import Allocation

VERDICTS: Mapping[Verdict, str] = {
    "fix_base": "fix the base models first: neither allocation can work as they are",
    "cold_grpo": "GRPO on the student directly",
    "bridge": "GRPO on the teacher, then the bridge into the student",
    "half_split": "half of the labels to the teacher and across the bridge, half to the student",
    "too_close": "too close to call",
}
_ALLOCATIONS: Mapping[Allocation, str] = {
    "cold_grpo": "GRPO on the student",
    "bridge": "teacher, then bridge",
    "half_split": "half and half",
}
_COSTS = {
    "labels": "labels",
    "verifier_calls": "calls",
    "generated_tokens": "generated",
    "updates": "updates",
    "seconds": "time",
}
_SOURCES = (
    "The rule and its thresholds: docs/pilot.md. What it rests on: the map of students by labels "
    "(docs/results/map.md), and arXiv:2605.12483"
)


def print_pilot(console: Console, found: PilotOutcome, plan: Plan) -> None:
    """Rates of both models, their distance, the advice, and what the recipe's arms would take."""
    console.print(_rates(found))
    console.print(Text(_distance(found)))
    console.print(Text(_spent(found)))
    console.print(Text(visible(f"\nadvice: {VERDICTS[found.advice.verdict]}"), style="bold"))
    for reason in found.advice.reasons:
        console.print(Text(visible(f"  because {reason}")))
    for caution in found.advice.cautions:
        console.print(Text(visible(f"  note: {caution}")))
    console.print(Text(f"  {_SOURCES}"))
    console.print(_costs(found, plan))
    for warning in found.warnings:
        console.print(Text(visible(f"warning: {warning}"), style="yellow"))


def _rates(found: PilotOutcome) -> Table:
    table = _table("", f"teacher: {found.teacher.name}", f"student: {found.student.name}")
    table.title = Text(
        visible(
            f"{found.name}: {found.problems} of {found.labels} labels, {found.attempts} attempts "
            f"each, seed {found.seed}; 95 % intervals over problems"
        )
    )
    models = (found.teacher, found.student)
    rates = [model.rates for model in models]
    group = found.group_size
    table.add_row("pass rate", *(_interval(one.pass_rate) for one in rates))
    table.add_row(f"pass@{group}", *(_interval(one.pass_at_k) for one in rates))
    table.add_row("headroom, points", *(points(one.headroom) for one in rates))
    table.add_row(f"groups of {group} with signal", *(_interval(one.signal) for one in rates))
    if found.trial_steps:
        steps = f"{found.trial_steps} steps of GRPO add"
        table.add_row(steps, *(_gained(model.gained) for model in models))
        ends = [model.end for model in models]
        table.add_row(
            "projected end of GRPO", *("" if end is None else _interval(end) for end in ends)
        )
    table.add_row("cut off", *(percent(one.truncation) for one in rates))
    table.add_row("no answer to read", *(percent(one.unparseable) for one in rates))
    table.add_row(
        "response tokens",
        *(f"{one.mean_tokens:.0f}, longest {one.longest_tokens}" for one in rates),
    )
    return table


def _distance(found: PilotOutcome) -> str:
    far = found.distance
    return (
        f"base teacher and base student on the student's answers: KL(student||teacher) "
        f"{far['reverse_kl']:.3f}, KL(teacher||student) {far['forward_kl']:.3f} nats a token; "
        f"{far['top_overlap']:.0%} of the student's top tokens are the teacher's, with "
        f"{far['overlap_mass']:.0%} of its mass. Longest prompt {found.prompt_tokens} tokens"
    )


def _spent(found: PilotOutcome) -> str:
    trial = (
        f", and {found.trial.labels} others with {found.trial.verifier_calls:,} calls for the trial"
        if found.trial_steps
        else ""
    )
    return (
        f"the pilot read {found.spent.labels} labels with {found.spent.verifier_calls:,} verifier "
        f"calls{trial}; on accounts of its own, in no arm's and no budget"
    )


def _costs(found: PilotOutcome, plan: Plan) -> Table:
    table = _table("allocation", "arm", *_COSTS.values())
    table.title = Text(f"one seed, responses of {found.mean_response} tokens")
    for allocation, words in _ALLOCATIONS.items():
        for arm in plan.arms:
            if arm.arm == found.arms.get(allocation):
                spending = arm.spending.as_dict()
                amounts = (spent(name, spending[name]) for name in _COSTS)
                table.add_row(words, Text(visible(arm.arm)), *amounts)
    return table


def _interval(share: Share) -> str:
    return f"{percent(share.mean)} ({percent(share.low)} to {percent(share.high)})"


def _gained(share: Share | None) -> str:
    if share is None:
        return ""
    return f"{points(share.mean)} ({points(share.low)} to {points(share.high)})"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in columns:
        table.add_column(visible(column), overflow="fold")
    return table
