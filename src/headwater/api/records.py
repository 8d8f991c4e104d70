"""What the verbs return."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.doctor import Check
    from headwater.errors import BudgetExhausted
    from headwater.recipes import ShippedRecipe
    from headwater.report.completions import CompletionTable
    from headwater.report.results import Results
    from headwater.report.samples import ReadRollout
    from headwater.verify.cases import CaseResult


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
