"""Reading a recipe: YAML, a profile, `--set` overrides, and errors that name file, key and cure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headwater.config.descriptions import described
from headwater.config.explain import explain
from headwater.config.plain_yaml import LARGEST_CHARACTERS, parse_yaml
from headwater.config.recipe import Recipe, merge
from headwater.config.reference import settings_models
from headwater.errors import InputError
from headwater.near_names import choose
from headwater.redaction import redact
from headwater.storage import write_whole


def load_recipe(path: Path, overrides: Sequence[str] = (), profile: str | None = None) -> Recipe:
    """Read a recipe file, lay a profile of it over it, override and validate.

    profile: one of the file's `profiles`. overrides: `a.b=value` strings, value in YAML; they
    win over the profile. Raises InputError that lists every problem.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such recipe; give a YAML file, or see `headwater recipes` for shipped ones"
        )
    size = path.stat().st_size
    if size > 4 * LARGEST_CHARACTERS:
        raise InputError(
            f"{path}: {size:,} bytes; a recipe has at most {LARGEST_CHARACTERS:,} characters: put "
            "data into a file of its own"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    data, changes = _take_profile(data, profile, str(path))
    data = merge(data, changes)
    for override in overrides:
        data = apply_override(data, override)
    return _validate(data, str(path), {} if profile is None else {profile: changes})


def validate_recipe(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe from plain values. Raises InputError that lists every problem."""
    return _validate(data, where, {})


def _validate(
    data: Mapping[str, Any], where: str, profiles: Mapping[str, Mapping[str, Any]]
) -> Recipe:
    """profiles: what was laid over the recipe, by name, so that an error can point there."""
    secrets = [
        f"{where}: {key}: holds what looks like an access token or a password, and a recipe is "
        "copied into runs and reports; take it out, and set it in the environment (HF_TOKEN)"
        for key in _secret_keys(data, "")
    ]
    if secrets:
        raise InputError("\n".join(secrets))
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{_origin(item['loc'], data, profiles)}{explain(Recipe, item)}"
            for item in error.errors()
        ]
        raise InputError("\n".join(f"{where}: {line}" for line in lines)) from None


def _secret_keys(value: Any, key: str) -> Iterator[str]:
    """Keys of texts that `redact` would change, as `a.b.0`."""
    if isinstance(value, str):
        if redact(value) != value:
            yield key
        return
    below: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        below = value.items()
    elif isinstance(value, list | tuple):
        below = enumerate(value)
    for name, part in below:
        yield from _secret_keys(part, f"{key}.{name}".lstrip("."))


# --- profiles ------------------------------------------------------------------------------------


def _take_profile(
    data: Mapping[str, Any], name: str | None, where: str
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The recipe without its key `profiles`, and the changes that the profile `name` makes."""
    rest = {key: value for key, value in data.items() if key != "profiles"}
    profiles = data.get("profiles") or {}
    if not isinstance(profiles, Mapping):
        raise InputError(
            f"{where}: profiles is a {type(profiles).__name__}; write {{NAME: {{recipe keys}}}}"
        )
    if name is None:
        return rest, {}
    if name not in profiles:
        cure = choose(name, profiles) if profiles else "it has none; add it under `profiles`"
        raise InputError(f"--profile {name}: not a profile of {where}; {cure}")
    changes = profiles[name]
    if not isinstance(changes, Mapping):
        raise InputError(f"{where}: profiles.{name} is no mapping; give it keys of a recipe")
    return rest, changes


def _origin(
    location: Sequence[Any], data: Mapping[str, Any], profiles: Mapping[str, Mapping[str, Any]]
) -> str:
    """`profiles.NAME.` where what stands at `location` came from that profile, else nothing."""
    for name, changes in profiles.items():
        if location and _at(changes, location) is not None:
            same = _at(changes, location) == _at(data, location)
            return f"profiles.{name}." if same else ""
    return ""


def _at(data: Any, location: Sequence[Any]) -> tuple[Any] | None:
    """What stands at an error's location, as a tuple of one; None where nothing does."""
    found = False
    for part in location:
        found = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if found:
            data = data[part]
        # Else a part that pydantic adds (which variant of a union it tried), or nothing.
    return (data,) if found else None


# --- overrides -----------------------------------------------------------------------------------


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


# --- writing -------------------------------------------------------------------------------------


def write_resolved(recipe: Recipe, path: Path) -> None:
    """Write the recipe, whole, with every default filled in, as YAML that `load_recipe` reads."""
    plain = json.loads(recipe.model_dump_json())
    write_whole(path, yaml.safe_dump(_unresolve(plain), sort_keys=False))


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
    """JSON Schema of a recipe file, for editors."""
    schema = described(Recipe.model_json_schema(), settings_models())
    profiles = {
        "description": "Recipe keys laid over the recipe with --profile NAME.",
        "type": "object",
        "additionalProperties": {"type": "object"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {**schema["properties"], "profiles": profiles},
    }
