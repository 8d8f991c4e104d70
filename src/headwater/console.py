"""How the verbs' results read in a terminal: one function for each record of `api`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.api import Diagnosis, Pilot, RecipeListing, RunReport, VerifiedCases
from headwater.types import Verdict
from headwater.visible import visible

if TYPE_CHECKING:
    from headwater.comparison.compare import BatchDone
    from headwater.comparison.record import Comparison
    from headwater.tasks.contamination_check import ContaminationCheck
    from headwater.workflow.estimate import Plan

_HEALTH_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


_MOST_ROWS = 40  # pairs that are shown
_EXCERPT = 100  # characters of a problem


def show_report(console: Console, result: RunReport) -> None:
    """The tables, the closing words and where the page is."""
    from headwater.report.terminal import print_summary

    print_summary(result.results, console)
    console.print(Text(visible(f"report: {result.page_path}")))


def show_samples(
    console: Console, run_dir: Path, *, arm: str | None, stage: str | None, count: int
) -> None:
    """Rollouts of a run under their headings."""
    from headwater.report.samples import print_samples

    print_samples(run_dir, console, arm=arm, stage=stage, number=count)


def show_plan(console: Console, plan: Plan) -> None:
    """Distinct stages, what each arm uses, devices, the totals and the warnings."""
    from headwater.report.plan_view import print_plan

    print_plan(console, plan)


def show_pilot(console: Console, result: Pilot) -> None:
    """What was measured, the advice with its evidence, and what each allocation would cost."""
    from headwater.report.pilot_view import print_pilot

    print_pilot(console, result.found, result.plan)


def show_batch(batch: BatchDone) -> None:
    """How far an evaluation is, on stderr."""
    from headwater.comparison.terminal import print_batch

    print_batch(_stderr(), batch)


def show_comparison(console: Console, result: Comparison) -> None:
    """Tables of every set and the settings; on stderr how much of it was finished before."""
    from headwater.comparison.terminal import print_comparison

    print_comparison(console, result)
    if result.read_back:
        _stderr().print(
            Text(
                f"{result.read_back} of {result.evaluations} evaluations were finished already and "
                f"read back from {visible(str(result.out))}; give another --out to make them anew"
            )
        )


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_verified(console: Console, result: VerifiedCases) -> None:
    """A line a case, then the counts and, where rows say what is right, the agreement."""
    table = _table("id", "verdict", "seconds", "how")
    for row in result.rows:
        marked = _disagrees(row.get("expected"), row["verdict"])
        verdict = Text(row["verdict"], style="red" if marked else "")
        name, how = Text(visible(row["id"])), Text(visible(row["how"]))
        table.add_row(name, verdict, f"{row['seconds']:.3f}", how)
    console.print(table)
    console.print(verified_in_words(result))
    silent = sum(row["how"].startswith("no answer") for row in result.rows)
    if silent:
        console.print(
            f"{silent} without an answer where one is looked for: --explain says more, --wrap-bare "
            "boxes bare answers, --verifier math:boxed,hash,answer_is looks in more places"
        )


def show_explained(console: Console, result: VerifiedCases) -> None:
    """Each case's steps under its name, then the counts."""
    for row in result.rows:
        marked = _disagrees(row.get("expected"), row["verdict"])
        heading = f"{row['id']}  {row['verdict']}, {row['seconds']:.3f} s"
        console.print(Text(visible(heading), style="bold red" if marked else "bold"))
        steps = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, text in row["steps"].items():
            steps.add_row(Text(visible(name), style="dim"), Text(visible(text), overflow="fold"))
        console.print(steps)
    console.print(verified_in_words(result))


def show_contamination(console: Console, result: ContaminationCheck) -> None:
    """Counts for each evaluation set, then the pairs, the closest first."""
    from headwater.report.quantities import percent

    kinds = ("exact", "normalised", "near")
    table = _table("evaluation set", "problems", *kinds, "of the set in training")
    table.title = Text(visible(f"{result.train}: {result.train_problems} training problems"))
    for name, problems in result.eval_problems.items():
        counts = result.counts(name)
        numbers = [str(problems), *(str(counts[kind]) for kind in kinds)]
        equal = counts["exact"] + counts["normalised"]
        table.add_row(Text(visible(name)), *numbers, percent(equal / problems))
    console.print(table)
    if result.pairs:
        pairs = _table("match", "share", "training problem", "evaluation problem", "its text")
        for pair in result.pairs[:_MOST_ROWS]:
            match = pair.match
            ids = (match.train_id, f"{match.eval_set}: {match.eval_id}")
            text = " ".join(pair.eval_text[:_EXCERPT].split())
            shown = (Text(visible(piece)) for piece in (*ids, text))
            pairs.add_row(match.kind, percent(match.share), *shown)
        console.print(pairs)
    if len(result.pairs) > _MOST_ROWS:
        console.print(f"{len(result.pairs) - _MOST_ROWS} more pairs; --csv OUT writes all")
    console.print(
        f"near: at least {percent(result.near_share)} of the evaluation problem's "
        f"{result.ngram_words}-grams are in the training problem; often a template with other "
        "numbers. A run removes exact and normalised matches from training, and lists near ones"
    )


def verified_in_words(result: VerifiedCases) -> str:
    """Counts of the verdicts, and how many are as expected."""
    counts = Counter(row["verdict"] for row in result.rows)
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    judged = [row for row in result.rows if "expected" in row]
    if not judged:
        return f"{len(result.rows)} cases: {words}"
    wrong = sum(_disagrees(row["expected"], row["verdict"]) for row in judged)
    return f"{len(result.rows)} cases: {words}; {len(judged) - wrong} of {len(judged)} as expected"


def show_diagnosis(console: Console, result: Diagnosis) -> None:
    """A line a check, with its cure below."""
    table = _table("", "check", "found")
    for check in result.checks:
        found = Text(visible(check.found))
        if check.cure:
            found.append(visible(f"\n-> {check.cure}"), style="dim")
        health = Text(check.health, style=_HEALTH_STYLES[check.health])
        table.add_row(health, Text(check.name), found)
    console.print(table)
    problems = sum(check.health == "problem" for check in result.checks)
    console.print("all is well" if not problems else f"{problems} to mend, marked `problem`")


def show_recipes(console: Console, result: RecipeListing) -> None:
    """Names and what each is for, or where the copy is."""
    if result.copied_to is not None:
        path = result.copied_to
        console.print(Text(visible(f"copied to {path}; run it: headwater run {path}")))
        return
    table = _table("recipe", "about")
    for recipe in result.recipes:
        table.add_row(Text(visible(recipe.name)), Text(visible(recipe.about)))
    console.print(table)
    console.print("run one: headwater run NAME; copy one to edit: headwater recipes NAME")


def _disagrees(expected: bool | None, verdict: str) -> bool:
    return expected is not None and (verdict == Verdict.CORRECT) != expected


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
