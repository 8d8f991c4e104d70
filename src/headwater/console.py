"""How the verbs' results read in a terminal: one function for each record of `api`."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.api import Diagnosis, RecipeListing, VerifiedCases
from headwater.types import Verdict

_HEALTH_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def show_verified(console: Console, result: VerifiedCases) -> None:
    """A line a case, then the counts and, where rows say what is right, the agreement."""
    table = _table("id", "verdict", "seconds", "how")
    for row in result.rows:
        marked = _disagrees(row.get("expected"), row["verdict"])
        verdict = Text(row["verdict"], style="red" if marked else "")
        table.add_row(Text(row["id"]), verdict, f"{row['seconds']:.3f}", Text(row["how"]))
    console.print(table)
    console.print(verified_in_words(result))


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
        found = Text(check.found)
        if check.cure:
            found.append(f"\n-> {check.cure}", style="dim")
        table.add_row(Text(check.health, style=_HEALTH_STYLES[check.health]), check.name, found)
    console.print(table)
    problems = sum(check.health == "problem" for check in result.checks)
    console.print("all is well" if not problems else f"{problems} to mend, marked `problem`")


def show_recipes(console: Console, result: RecipeListing) -> None:
    """Names and what each is for, or where the copy is."""
    if result.copied_to is not None:
        path = result.copied_to
        console.print(Text(f"copied to {path}; run it: headwater run {path}"))
        return
    table = _table("recipe", "about")
    for recipe in result.recipes:
        table.add_row(recipe.name, Text(recipe.about))
    console.print(table)
    console.print("run one: headwater run NAME; copy one to edit: headwater recipes NAME")


def _disagrees(expected: bool | None, verdict: str) -> bool:
    return expected is not None and (verdict == Verdict.CORRECT) != expected


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
