"""What a function is made of, as plain values: for fingerprints of what is computed with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_EMPTY = CellType()
_PLAIN = str | int | float | bool | None


def describe_function(function: Callable[..., Any]) -> Any:
    """Source, defaults, captured and global values of a function or callable object, as JSON.

    Functions of the same module that its code names are described too, and, of a method or what is
    called, the attributes and the methods of its class; functions of other modules, and objects
    that are neither plain values nor called, are described by their names alone.
    """
    return _describe(function, set())


def _describe(value: Any, seen: set[int]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if id(value) in seen:
        return "seen"
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return [[str(key), _describe(item, seen)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_describe(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_describe(item, seen)) for item in value)
    if isinstance(value, functools.partial):
        return [_describe(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        owner = value.__self__
        if isinstance(owner, type):
            return [_describe(value.__func__, seen), _of_class(owner, seen)]
        own = _describe(getattr(owner, "__dict__", {}), seen)
        return [_describe(value.__func__, seen), own, _of_class(type(owner), seen)]
    if isinstance(value, FunctionType):
        return _of_function(value, seen)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | BuiltinFunctionType):
        return [value.__module__, value.__qualname__]
    kind = type(value)
    if not callable(value):
        return [kind.__module__, kind.__qualname__]
    own = _describe(getattr(value, "__dict__", {}), seen)
    return [kind.__module__, _of_class(kind, seen), own]


def _of_class(kind: type, seen: set[int]) -> Any:
    """Source and methods of a class, and of those of the same module that it inherits from."""
    found: list[Any] = []
    for base in kind.__mro__:
        if base.__module__ != kind.__module__:
            found.append([base.__module__, base.__qualname__])
            continue
        parts = vars(base).values()
        methods = (getattr(part, "__func__", getattr(part, "fget", part)) for part in parts)
        described = [_describe(one, seen) for one in methods if isinstance(one, FunctionType)]
        found.append([_source(base), described])
    return found


def _of_function(function: FunctionType, seen: set[int]) -> Any:
    own, code = function.__module__, function.__code__
    cells = function.__closure__ or ()
    captured = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, cells, strict=True)
        if cell != _EMPTY
    }
    found = {name: function.__globals__.get(name) for name in sorted(_names(code))}
    named = {
        name: value
        for name, value in found.items()
        if isinstance(value, _PLAIN | list | tuple | dict | set | frozenset)
        or getattr(value, "__module__", None) == own
    }
    return [
        own,
        function.__qualname__,
        _source(function),
        _describe(function.__defaults__, seen),
        _describe(function.__kwdefaults__, seen),
        _describe(captured, seen),
        _describe(named, seen),
    ]


def _names(code: CodeType) -> set[str]:
    """Global names that code uses, in comprehensions and inner functions too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _source(code: FunctionType | type) -> str:
    """The text of a function or class; its bytecode where the text is gone."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return code.__code__.co_code.hex() if isinstance(code, FunctionType) else code.__qualname__
