"""What is wrong with a value, in one line: key, value found, expectation, and a near name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from headwater.near_names import near

#: Keys of a file that are taken out of it before the rest is read.
_OF_THE_FILE = ("profiles",)


def explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One line: key, value found, what was expected, and a near name for a misspelt one."""
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    if error["type"] == "extra_forbidden":
        *before, unknown = location
        members, parts = _walk(model, before)
        known = list(dict.fromkeys(name for one in members for name in _fields(one)))
        near_keys = [*known, *(_OF_THE_FILE if not before else ())]
        hint = near(unknown, near_keys) or f"; known keys: {', '.join(sorted(known))}"
        return f"{_key([*parts, unknown])}: unknown key{hint}"
    key = _key(_walk(model, location)[1])
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        return f"{key} = {tag!r}: expected one of {tags}{near(tag, _quoted(tags))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if key == "recipe" else f"{key}: {message}"
    found = error.get("input")
    shown = f" = {found!r}" if isinstance(found, str | int | float | bool | None) else ""
    if error["type"] == "dict_type":
        return f"{key}{shown}: expected names with values, such as {{NAME: VALUE}}"
    hint = near(found, _quoted(message)) if error["type"] == "literal_error" else ""
    return f"{key}{shown}: {message[0].lower()}{message[1:]}{hint}"


def _quoted(text: str) -> list[str]:
    """The names between quotes in a list of what was expected."""
    return re.findall(r"'([^']+)'", text)


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("constrained-int",))


def _key(parts: Sequence[Any]) -> str:
    return ".".join(str(part) for part in parts) or "recipe"


def _walk(
    model: type[BaseModel], location: Sequence[Any]
) -> tuple[list[type[BaseModel]], list[Any]]:
    """The settings at a location, and the keys that lead there as a recipe has them.

    A location also names which member of a union was read, by its kind: no key of the recipe.
    """
    members: list[type[BaseModel]] = [model]
    keys: list[Any] = []
    named = False  # the next part is a name that the user gave
    for part in location:
        inner = [_fields(one)[part].annotation for one in members if part in _fields(one)]
        if named or isinstance(part, int):
            named = False
        elif inner:
            members = [found for annotation in inner for found in _settings_in(annotation)]
            named = any(get_origin(annotation) is dict for annotation in inner)
        elif of_this_kind := [one for one in members if _kind(one) == part]:
            members = of_this_kind
            continue
        keys.append(part)
    return members, keys


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """A settings model's fields by the keys that recipes have."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _kind(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return None if field is None else field.default


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings models inside an annotation such as `dict[str, Arm]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _settings_in(inner)]
