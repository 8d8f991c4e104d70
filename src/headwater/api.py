"""The verbs of the command line, for Python. Each returns a record; none prints.

Importing this module loads neither torch nor transformers: every verb imports what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe
    from headwater.doctor import Check
    from headwater.recipes import ShippedRecipe
    from headwater.verify.cases import CaseResult


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


def load(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, the name of a shipped one, or as it is.

    overrides: `a.b=value` strings. Raises InputError listing every problem of the file.
    """
    from headwater.config.loading import load_recipe
    from headwater.config.recipe import Recipe
    from headwater.recipes import find_recipe

    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("overrides change a file's values; use recipe.model_copy instead")
        return recipe
    return load_recipe(find_recipe(recipe), overrides)


def verify(
    cases: str | Path,
    verifier: str = "math",
    *,
    wrap_bare: bool = False,
    workers: int = 1,
    timeout_seconds: float = 5.0,
) -> VerifiedCases:
    """Grade a JSON Lines file of {prediction, gold[, id, expected]} rows.

    wrap_bare: put predictions without any box into one. Raises InputError with file and line.
    """
    from headwater.verify.cases import run_cases

    rows = run_cases(
        Path(cases), verifier, wrap_bare=wrap_bare, workers=workers, timeout_seconds=timeout_seconds
    )
    return VerifiedCases(tuple(rows))


def doctor() -> Diagnosis:
    """Examine the installation and the machine; takes about ten seconds."""
    from headwater.doctor import examine

    return Diagnosis(tuple(examine()))


def recipes(copy: str | None = None, to: Path | None = None) -> RecipeListing:
    """The shipped recipes; with `copy`, also copy the one of that name to `to`."""
    from headwater.recipes import copy_recipe, shipped_recipes

    copied_to = None if copy is None else copy_recipe(copy, to)
    return RecipeListing(tuple(shipped_recipes()), copied_to)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    from headwater.config.loading import recipe_schema

    return recipe_schema()
