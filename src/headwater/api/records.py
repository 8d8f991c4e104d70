"""What the verbs return."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.doctor import Check
    from headwater.errors import BudgetExhausted
    from headwater.recipes import ShippedRecipe
    from headwater.report.completions import CompletionTable
    from headwater.report.results import Results
    from headwater.report.samples import ReadRollout
    from headwater.verify.cases import CaseResult
    from headwater.workflow.outcome import RunOutcome


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run found and where it is written; `stopped` is the budget that ended it early."""

    run_dir: Path
    results: Results
    results_path: Path
    page_path: Path
    stopped: BudgetExhausted | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": str(self.run_dir),
            "results_path": str(self.results_path),
            "page_path": str(self.page_path),
            "stopped": None if self.stopped is None else str(self.stopped),
            "results": self.results.model_dump(mode="json", by_alias=True),
        }


@dataclass(frozen=True)
class StageRecord:
    """What a stage that was called on its own left.

    folder: its artifact, with `model` (a Hugging Face folder) and, where it drew any,
    `rollouts_path` (Parquet) in it. metrics: a row a step, with "step" and "seconds". spent: the
    ledger's counters, those of the stages it reads (teacher rollouts) included.
    """

    kind: str
    run_dir: Path
    fingerprint: str
    folder: Path
    model: Path
    rollouts_path: Path | None
    metrics: tuple[Mapping[str, float], ...] = field(repr=False)
    spent: Mapping[str, float] = field(repr=False)

    @classmethod
    def of(cls, outcome: RunOutcome, fingerprint: str) -> StageRecord:
        """The record of a run's stage that is published."""
        graph = outcome.record.graph
        folder = outcome.run_dir / "artifacts" / fingerprint
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        source = graph.nodes[fingerprint].rollouts or fingerprint  # the default teacher's
        rollouts = outcome.run_dir / "artifacts" / source / "rollouts.parquet"
        return cls(
            kind=graph.nodes[fingerprint].kind,
            run_dir=outcome.run_dir,
            fingerprint=fingerprint,
            folder=folder,
            model=folder / "model",
            rollouts_path=rollouts if rollouts.is_file() else None,
            metrics=tuple(json.loads(line) for line in lines),
            spent=outcome.training,
        )

    def column(self, name: str) -> list[float]:
        """One metric over the steps, in their order. Raises InputError for one there is not."""
        names = dict.fromkeys(key for row in self.metrics for key in row)
        if name not in names:
            raise InputError(f"no metric {name!r}; {self.kind} has {', '.join(names)}")
        return [row[name] for row in self.metrics if name in row]

    def rollouts(self) -> list[dict[str, Any]]:
        """The rollouts kept for reading: step, prompt, response, reward and verdict of each."""
        if self.rollouts_path is None:
            return []
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(self.rollouts_path).to_pylist()
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "metrics"}
        paths = {name: str(value) for name, value in plain.items() if isinstance(value, Path)}
        return plain | paths | {"spent": dict(self.spent), "metrics": list(self.metrics)}


@dataclass(frozen=True, slots=True)
class Samples:
    """Rollouts of a run under headings."""

    groups: tuple[tuple[str, tuple[ReadRollout, ...]], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "groups": [
                {"heading": heading, "rollouts": [asdict(rollout) for rollout in rollouts]}
                for heading, rollouts in self.groups
            ]
        }


@dataclass(frozen=True, slots=True)
class Completions:
    """Completions of a training step, a table for each stage that samples."""

    tables: tuple[CompletionTable, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tables": [table.as_dict() for table in self.tables]}


@dataclass(frozen=True, slots=True)
class VerifiedCases:
    """A verdict for each row of a case file."""

    rows: tuple[CaseResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"cases": list(self.rows)}

    def json_lines(self) -> str:
        """One JSON object a line."""
        return "".join(f"{json.dumps(row)}\n" for row in self.rows)

    def write(self, path: Path) -> None:
        """Write `json_lines` to a file, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.json_lines(), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing keeps headwater from working."""
        return all(check.health != "problem" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"healthy": self.healthy, "checks": [check.as_dict() for check in self.checks]}


@dataclass(frozen=True, slots=True)
class RecipeListing:
    """The shipped recipes, or the copy that was made of one."""

    recipes: tuple[ShippedRecipe, ...]
    copied_to: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        copied = None if self.copied_to is None else str(self.copied_to)
        return {"recipes": [recipe.as_dict() for recipe in self.recipes], "copied_to": copied}
