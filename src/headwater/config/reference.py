"""The reference of a recipe's keys, written from the models that read it."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from headwater.config.descriptions import description
from headwater.config.recipe import Recipe

_HEAD = """# Recipe reference

Every key of a recipe: what it may be, its default, and what it means. This page is written from the
models that read recipes. `headwater recipes --schema` prints the same as a JSON Schema, which
editors use to complete and check as you type. Unknown keys are refused, with a near name.
"""

_MOST_PLACES = 4
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "from",
    "exclusiveMaximum": "below",
    "maximum": "to",
}


def settings_models() -> dict[str, type[BaseModel]]:
    """Every class of settings that a recipe is made of, by name, in the order of the file."""
    return {model.__name__: model for _, model in _settings(Recipe, ())}


def recipe_reference() -> str:
    """Markdown: a section for each group of settings, a row for each key."""
    parts = [_HEAD]
    places: dict[str, list[str]] = {}
    for place, model in _settings(Recipe, ()):
        places.setdefault(model.__name__, []).append(f"`{'.'.join(place)}`")
    for name, model in settings_models().items():
        schema = model.model_json_schema()
        own = schema["$defs"].get(name, schema) if "$defs" in schema else schema
        properties = own["properties"]
        rows = [
            f"| `{key}` | {_type(value)} | {_default(model, key)} | {_cell(model, key)} |"
            for key, value in properties.items()
        ]
        words = " ".join((model.__doc__ or "").split("\n\n")[0].split())
        if model is not Recipe:
            words += f" At {', '.join(places[name][:_MOST_PLACES])}."
        head = "| key | is | default | means |\n| --- | --- | --- | --- |"
        parts.append(f"## {name}\n\n{words}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _settings(
    model: type[BaseModel], place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Groups of settings with the keys that lead to them; NAME and [] for any name or item."""
    yield place, model
    for key, field in model.model_fields.items():
        named = typing.get_origin(field.annotation) is dict
        listed = typing.get_origin(field.annotation) is tuple
        step = (key, "NAME") if named else (f"{key}[]",) if listed else (key,)
        for inner in _inside(field.annotation):
            yield from _settings(inner, (*place, *step))


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _inside(argument)


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in words of a table's cell."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[union]))
    if "enum" in schema:
        return " or ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "anything")
    if kind == "null":
        return "`null`"
    if kind == "array":
        # a pair has its two schemas one by one
        inner = schema.get("items") or schema.get("prefixItems", [{}])[0]
        return f"list of {_type(inner)}"
    if kind == "object":
        by_pattern = [*schema.get("patternProperties", {}).values()]
        values = by_pattern[0] if by_pattern else schema.get("additionalProperties")
        return f"names, each {_type(values)}" if isinstance(values, Mapping) else "keys"
    name = {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(kind, kind)
    bounds = [f"{words} {schema[key]}" for key, words in _BOUNDS.items() if key in schema]
    return " ".join([name, *bounds])


def _default(model: type[BaseModel], key: str) -> str:
    field = next(f for n, f in model.model_fields.items() if key in (n, f.alias))
    if field.is_required():
        return "needed"
    value = field.default
    if value is PydanticUndefined:
        return "none"
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f"`{kind}`" if kind is not None and len(value.model_fields_set) < 2 else "see there"
    return f"`{json.dumps(value)}`"


def _cell(model: type[BaseModel], key: str) -> str:
    words = description(model, key) or ""
    # neither a column nor a link
    return words.replace("||", "‖").replace("|", "\\|").replace("[", "\\[")
