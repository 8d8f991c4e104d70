"""YAML that may come from anybody: plain values only, within limits, problems with their line.

Safe loading builds no objects; it does build whatever aliases ask for. A kilobyte of aliases of
aliases stands for gigabytes, and one inside what it names for a value without an end.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from headwater.errors import InputError

LARGEST_CHARACTERS = 2**20
LARGEST_VALUES = 100_000
"""Keys, items and plain values together, each alias counted as all that it stands for."""
DEEPEST = 60
_LARGEST_NUMBER = 2**63


class _PlainLoader(yaml.SafeLoader):
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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Hexadecimal digits can make a number too long to be written out."""
        number = int(super().construct_yaml_int(node))
        if abs(number) >= _LARGEST_NUMBER:
            raise ValueError(f"line {node.start_mark.line + 1}: a number of more than 64 bits")
        return number


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$")
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as Python values.

    Raises InputError with `where` and the line for what is not YAML, holds anything but plain
    values, or is larger or deeper than the limits above, aliases expanded.
    """
    if len(text) > LARGEST_CHARACTERS:
        raise InputError(
            f"{where}: {len(text):,} characters of YAML; at most {LARGEST_CHARACTERS:,} are read: "
            "put data into a file of its own"
        )
    try:
        return _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}{line}: not valid YAML ({problem}); mend this line") from None
    except ValueError as error:  # what looks like a date or a number and is none
        raise InputError(f"{where}: not valid YAML ({error}); quote the value") from None
    except RecursionError:
        raise InputError(
            f"{where}: nested deeper than {DEEPEST} levels; write it flatter"
        ) from None
    except InputError as error:
        raise InputError(f"{where}, {error}") from None


def _parse(text: str) -> Any:
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: tuple[int, ...]) -> None:
    """Put a node's (values, levels), aliases expanded, into `known` by its id.

    Raises InputError where they pass the limits, and for a node that contains itself.
    """
    key, line = id(node), node.start_mark.line + 1
    if key in above:
        raise InputError(f"line {line}: an alias stands inside what it names; write it out")
    if key in known:
        return
    values, levels = 1, 1
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    for item in below:
        for part in item if isinstance(item, tuple) else (item,):
            _measure(part, known, (*above, key))
            values += known[id(part)][0]
            levels = max(levels, 1 + known[id(part)][1])
    if values > LARGEST_VALUES:
        raise InputError(
            f"line {line}: {values:,} values once its aliases are written out; at most "
            f"{LARGEST_VALUES:,} are read: use fewer aliases"
        )
    if levels > DEEPEST:
        raise InputError(f"line {line}: nested {levels} levels deep; at most {DEEPEST} are read")
    known[key] = values, levels
