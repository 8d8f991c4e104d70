"""Reading a recipe: YAML, `--set` overrides, and errors that name file, key and cure."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headwater.config.explain import explain
from headwater.config.recipe import Recipe
from headwater.errors import InputError


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 numbers (`1e-6` is a number) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise InputError(
                    f"line {line}: key {key!r} is no plain value; write text, or quote it"
                )
            if key in seen:
                raise InputError(f"line {line}: key {key!r} occurs twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$")
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as Python values. Raises InputError with `where` and the line."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}{line}: not valid YAML ({problem}); mend this line") from None
    except ValueError as error:  # what looks like a date or a number and is none
        raise InputError(f"{where}: not valid YAML ({error}); quote the value") from None
    except InputError as error:
        raise InputError(f"{where}, {error}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe file.

    overrides: `a.b=value` strings, value in YAML. Raises InputError that lists every problem.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such recipe; give a YAML file, or see `headwater recipes` for shipped ones"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    for override in overrides:
        data = apply_override(data, override)
    return validate_recipe(data, where=str(path))


def validate_recipe(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe from plain values. Raises InputError that lists every problem."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [explain(Recipe, item) for item in error.errors()]
        raise InputError("\n".join(f"{where}: {line}" for line in lines)) from None


def apply_override(data: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of `data` with one `a.b=value` applied.

    >>> apply_override({"a": {"b": 1}}, "a.b=2")
    {'a': {'b': 2}}
    """
    key, separator, value = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(
            f"--set {override}: expected KEY.SUBKEY=VALUE, such as stages.grpo.steps=50"
        )
    return _set(data, parts, parse_yaml(value, f"--set {override}"), override)


def _set(data: Any, parts: Sequence[str], value: Any, override: str) -> Any:
    head, rest = parts[0], parts[1:]
    if isinstance(data, list):
        if not (head.isascii() and head.isdigit()) or int(head) >= len(data):
            raise InputError(f"--set {override}: {head!r} is no index of a list of {len(data)}")
        index = int(head)
        new = _set(data[index], rest, value, override) if rest else value
        return [*data[:index], new, *data[index + 1 :]]
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise InputError(f"--set {override}: {head!r} lies below a plain value; shorten the key")
    return {**data, head: _set(data.get(head), rest, value, override) if rest else value}


def write_resolved(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in, as YAML that `load_recipe` reads."""
    plain = json.loads(recipe.model_dump_json())
    path.write_text(yaml.safe_dump(_unresolve(plain), sort_keys=False), encoding="utf-8")


def _unresolve(plain: dict[str, Any]) -> dict[str, Any]:
    """Chain items back in the short grammar."""

    def chain(items: list[dict[str, Any]] | None) -> list[Any] | None:
        if items is None:
            return None
        return [
            {i["kind"]: {**({"pool": i["pool"]} if i["pool"] else {}), **i["overrides"]}}
            for i in items
        ]

    for arm in plain["arms"].values():
        arm["teacher"], arm["student"] = chain(arm["teacher"]), chain(arm["student"])
    for model in plain["models"].values():
        model["prepare"] = chain(model["prepare"])
    return plain


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of the recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
