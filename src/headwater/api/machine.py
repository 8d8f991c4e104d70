"""The verbs about what is installed: doctor, recipes, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwater.api.records import Diagnosis, RecipeListing


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
