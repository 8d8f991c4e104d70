"""How the verbs' results read in a terminal: one function for each record of `api`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.api import (
    Completions,
    Diagnosis,
    Pilot,
    RecipeListing,
    RunReport,
    VerifiedCases,
)
from headwater.terminal import BAD, CAUTION, GOOD, HEADING, QUIET, stderr_console
from headwater.types import Verdict
from headwater.visible import visible

if TYPE_CHECKING:
    from headwater.chat import Answer
    from headwater.comparison.compare import BatchDone
    from headwater.comparison.record import Comparison
    from headwater.publishing.export import Export
    from headwater.tasks.contamination_check import ContaminationCheck
    from headwater.workflow.estimate import Plan

_HEALTH_STYLES = {"ok": GOOD, "note": CAUTION, "problem": BAD}
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


def show_completions(console: Console, result: Completions) -> None:
    """A table for each stage that samples."""
    from headwater.report.completions import print_completions

    print_completions(console, result.tables)


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

    print_batch(stderr_console(), batch)


def show_comparison(console: Console, result: Comparison) -> None:
    """Tables of every set and the settings; on stderr how much of it was finished before."""
    from headwater.comparison.terminal import print_comparison

    print_comparison(console, result)
    if result.read_back:
        stderr_console().print(
            Text(
                f"{result.read_back} of {result.evaluations} evaluations were finished already and "
                f"read back from {visible(str(result.out))}; give another --out to make them anew"
            )
        )


def show_verified(console: Console, result: VerifiedCases) -> None:
    """A line a case, then the counts and, where rows say what is right, the agreement."""
    table = _table("id", "verdict", "seconds", "how", right=("seconds",))
    for row in result.rows:
        marked = _disagrees(row.get("expected"), row["verdict"])
        verdict = Text(row["verdict"], style=BAD if marked else "")
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
        console.print(Text(visible(heading), style=BAD if marked else HEADING))
        steps = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, text in row["steps"].items():
            steps.add_row(Text(visible(name), style=QUIET), Text(visible(text), overflow="fold"))
        console.print(steps)
    console.print(verified_in_words(result))


def show_contamination(console: Console, result: ContaminationCheck) -> None:
    """Counts for each evaluation set, then the pairs, the closest first."""
    from headwater.report.quantities import percent

    kinds = ("exact", "normalised", "near")
    counted = ("problems", *kinds, "of the set in training")
    table = _table("evaluation set", *counted, right=counted)
    table.title = Text(visible(f"{result.train}: {result.train_problems} training problems"))
    for name, problems in result.eval_problems.items():
        counts = result.counts(name)
        numbers = [str(problems), *(str(counts[kind]) for kind in kinds)]
        equal = counts["exact"] + counts["normalised"]
        table.add_row(Text(visible(name)), *numbers, percent(equal / problems))
    console.print(table)
    if result.pairs:
        columns = ("match", "share", "training problem", "evaluation problem", "its text")
        pairs = _table(*columns, right=("share",))
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


def show_export(console: Console, result: Export) -> None:
    """What was written, how large, from which stage, and what to do with it."""
    from headwater.report.quantities import byte_count

    whose = f"arm {result.arm}, seed {result.seed}, {result.role}" if result.arm else result.source
    lines = [
        f"{result.folder}: {whose}; {result.format}, {result.dtype}, {byte_count(result.bytes)}",
        *(f"  {name}" for name in result.files),
    ]
    if result.card is None:
        lines.append("no model card: it came from no run and had none; write README.md yourself")
    if result.address is not None:
        lines.append(f"uploaded: {result.address}")
    if result.format == "hf":
        lines.append(
            f"serve it: vllm serve {result.folder}; talk to it: headwater chat {result.folder}"
        )
    console.print(Text(visible("\n".join(lines))))


class GrowingText:
    """A text printed while it grows, each part once."""

    def __init__(self, console: Console) -> None:
        self._console, self._shown = console, ""

    def show(self, text: str) -> None:
        """Print what has come to `text`; a text that changed where it was printed waits."""
        whole = visible(text)
        if whole.startswith(self._shown):
            self._console.print(Text(whole[len(self._shown) :]), end="", soft_wrap=True)
            self._shown = whole

    def end(self, text: str) -> None:
        """Print what is left of the whole text, or all of it again where it changed."""
        whole = visible(text)
        rest = whole.removeprefix(self._shown)
        left = rest if whole.startswith(self._shown) else f"\n{whole}"
        self._console.print(Text(left), soft_wrap=True)


def show_answer(console: Console, answer: Answer, growing: GrowingText | None = None) -> None:
    """What the model said, where `growing` has not shown it yet; a mark where it was cut off."""
    (growing or GrowingText(console)).end(answer.text)
    if answer.finish_reason == "length":
        console.print(Text(f"[cut off after {answer.tokens} tokens]", style="dim"))


def verified_in_words(result: VerifiedCases) -> str:
    """Counts of the verdicts, and how many are as expected."""
    counts = Counter(row["verdict"] for row in result.rows)
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    cases = f"{len(result.rows)} case{'s' if len(result.rows) != 1 else ''}"
    judged = [row for row in result.rows if "expected" in row]
    if not judged:
        return f"{cases}: {words}"
    wrong = sum(_disagrees(row["expected"], row["verdict"]) for row in judged)
    return f"{cases}: {words}; {len(judged) - wrong} of {len(judged)} as expected"


def show_diagnosis(console: Console, result: Diagnosis) -> None:
    """A line a check, with its cure below."""
    table = _table("", "check", "found")
    for check in result.checks:
        found = Text(visible(check.found))
        if check.cure:
            found.append(visible(f"\n-> {check.cure}"), style=QUIET)
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


def _table(*columns: str, right: Collection[str] = ()) -> Table:
    """right: the columns of numbers."""
    table = Table(
        title_justify="left", title_style=HEADING, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return table
