"""Completions of one training step as a table: prompt, completion, reward, advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.errors import InputError
from headwater.tracking.completions import Completion, last_step, read_completions
from headwater.tracking.stage_files import rollout_files
from headwater.visible import excerpt, visible
from headwater.workflow.confinement import require_own_files
from headwater.workflow.record import read_record

_LONGEST = 600  # characters of a prompt or a completion


@dataclass(frozen=True, slots=True)
class CompletionTable:
    """Completions of one step of one stage; those to one problem stand together."""

    stage: str
    heading: str
    step: int
    completions: tuple[Completion, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [one.row() for one in self.completions]
        return {"stage": self.stage, "heading": self.heading, "step": self.step, "rows": rows}


def completion_tables(
    run_dir: Path,
    *,
    arm: str | None = None,
    stage: str | None = None,
    step: int | None = None,
    count: int = 4,
) -> list[CompletionTable]:
    """The first `count` completions of a step of every stage that samples, also one in hand.

    arm: only stages that this arm uses; stage: a kind, or the beginning of a fingerprint. step:
    from 1, by default each stage's last one that was kept. Raises InputError where nothing
    matches, or a file of rollouts cannot be read.
    """
    record = read_record(run_dir)
    require_own_files(run_dir)
    graph, found = record.graph, []
    for fingerprint, node in graph.nodes.items():
        users = graph.users[fingerprint]
        if (arm is not None and arm not in users) or (
            stage is not None and stage != node.kind and not fingerprint.startswith(stage)
        ):
            continue
        paths = rollout_files(run_dir, fingerprint)
        try:
            wanted = step if step is not None else last_step(paths[-1]) if paths else None
            rows = read_completions(paths, partial(eq, wanted))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise InputError(
                f"{paths[0].parent} holds no rollouts that can be read "
                f"({str(error).splitlines()[0]}), expected Parquet as a stage writes it; run the "
                "stage again"
            ) from error
        for number, completions in rows.items():
            heading = f"{graph.describe(fingerprint)}, step {number}"
            table = CompletionTable(fingerprint, heading, number, tuple(completions[:count]))
            found.append(table)
    if not found:
        raise InputError(
            f"no completions in {run_dir} for arm={arm or 'any'}, stage={stage or 'any'}, "
            f"step={step or 'the last'}; expected a step of a stage that samples and has saved: "
            "leave some of these out"
        )
    return found


def print_completions(console: Console, tables: Sequence[CompletionTable]) -> None:
    """A table for each stage, control characters made visible."""
    for one in tables:
        table = Table(box=box.ROUNDED, show_lines=True, title=Text(visible(one.heading)))
        table.add_column("prompt", style="yellow", overflow="fold")
        table.add_column("completion", style="green", overflow="fold")
        table.add_column("reward", style="cyan", justify="right")
        table.add_column("advantage", style="magenta", justify="right")
        for row in one.completions:
            table.add_row(
                Text(visible(excerpt(row.prompt, _LONGEST))),
                Text(visible(excerpt(row.completion, _LONGEST))),
                _number(row.reward),
                _number(row.advantage),
            )
        console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
