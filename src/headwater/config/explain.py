"""What is wrong with a value, in one line: key, value found, expectation, and a near name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One line: key, value found, what was expected, and a near name for a misspelt key."""
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if key == "recipe" else f"{key}: {message}"
    found = error.get("input")
    shown = f" = {found!r}" if isinstance(found, str | int | float | bool | None) else ""
    return f"{key}{shown}: {message[0].lower()}{message[1:]}"


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("constrained-int",))


def _known_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    current: Any = model
    for part in location:
        fields = _fields(current)
        if fields and part in fields:
            current = _inner_model(fields[part].annotation)
        elif fields is None:
            return []
    return [*(_fields(current) or {})]


def _fields(model: Any) -> dict[str, Any] | None:
    """A settings model's fields by the keys that recipes have; None for anything else."""
    fields = getattr(model, "model_fields", None)
    return fields and {field.alias or name: field for name, field in fields.items()}


def _inner_model(annotation: Any) -> Any:
    """The settings model inside an annotation such as `dict[str, Arm]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
