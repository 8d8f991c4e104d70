"""What a shell offers for a word, from the words before it. Offers nothing rather than fail.

Each function takes what is typed of the word, and returns words, or pairs of a word and what it
is about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe

_PLAIN = re.compile(r"[\w./+-]+")  # what no shell reads anything into
_ABOUT = 70  # characters
#: Keys of a recipe that are lists or names of its own, which --set seldom reaches into.
_NOT_OFFERED = frozenset({"name", "question", "arms", "contrasts", "hypotheses", "map"})


def choices(*words: str) -> Callable[[str], list[str]]:
    """Offers these words."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offered


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes and YAML files of the current folder."""
    from headwater.recipes import shipped_recipes

    here = [(path.name, "a file here") for path in sorted(Path().glob("*.yaml"))]
    shipped = [(one.name, one.about[:_ABOUT]) for one in shipped_recipes()]
    return [pair for pair in (*shipped, *here) if pair[0].startswith(incomplete)]


def shipped(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes alone."""
    return [pair for pair in recipes(incomplete) if not pair[0].endswith(".yaml")]


def runs(incomplete: str) -> list[str]:
    """Folders of runs below runs/; for others the shell offers files."""
    found = (str(path.parent) for path in sorted(Path("runs").glob("*/run.json")))
    return [folder for folder in found if folder.startswith(incomplete)]


def benchmarks(incomplete: str) -> list[tuple[str, str]]:
    """Evaluation sets that have names."""
    from headwater.tasks.benchmarks import BENCHMARKS

    named = ((one.name, f"{one.title}, {one.problems} problems") for one in BENCHMARKS.values())
    return [pair for pair in named if pair[0].startswith(incomplete)]


def profiles(ctx: typer.Context, incomplete: str) -> list[str]:
    """The profiles of the recipe."""
    path = _recipe_path(ctx)
    if path is None:
        return []
    from headwater.config.plain_yaml import parse_yaml

    try:
        found = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (InputError, OSError, ValueError):
        return []
    named = found.get("profiles") if isinstance(found, Mapping) else None
    return [str(name) for name in named or () if str(name).startswith(incomplete)]


def arms(ctx: typer.Context, incomplete: str) -> list[str]:
    """The arms of the recipe, after those that are typed already and a comma."""
    recipe = _recipe(ctx)
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    left = [name for name in (recipe.arms if recipe else ()) if name not in taken]
    return [f"{before}{comma}{name}" for name in left if name.startswith(last)]


def set_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Every key of the recipe with its value as KEY=VALUE; without a recipe, keys with defaults."""
    from headwater.config.recipe import Recipe

    recipe = _recipe(ctx)
    if recipe is not None:
        plain = recipe.model_dump(mode="json")
    else:
        fields = Recipe.model_fields.items()
        plain = {name: _plain(field.get_default()) for name, field in fields}
    offered = {key: value for key, value in plain.items() if key not in _NOT_OFFERED}
    words = (f"{key}={_word(value)}" for key, value in _leaves(offered, ""))
    return [word for word in words if word.startswith(incomplete)]


def _recipe_path(ctx: typer.Context) -> Path | None:
    """The file of the recipe, or of the run's recipe, that the words before name."""
    from headwater.recipes import find_recipe

    is_run = "run" in ctx.params
    # Where the last word is an option without its value, none of the words are parameters yet.
    named = ctx.params.get("run" if is_run else "recipe") or next(iter(ctx.args), "")
    try:
        return find_recipe(Path(named) / "recipe.yaml" if is_run else named)
    except InputError:
        return None


def _recipe(ctx: typer.Context) -> Recipe | None:
    from headwater.config.loading import load_recipe

    path = _recipe_path(ctx)
    try:
        return None if path is None else load_recipe(path, profile=ctx.params.get("profile"))
    except InputError:
        return None


def _plain(value: Any) -> Any:
    from pydantic import BaseModel

    return value.model_dump(mode="json") if isinstance(value, BaseModel) else {}


def _leaves(plain: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _word(value: Any) -> str:
    """The value as YAML where it needs no quotes in a shell, else nothing."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if _PLAIN.fullmatch(text) else ""
