"""Finding the function that a verifier names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(target: str) -> Callable[..., Any]:
    """The function of "module:name"; of "module:maker:argument", what the maker returns for it.

    The module may be given as the path of a file ending in .py; its folder is then searched for
    what it imports. Raises whatever importing it does, AttributeError and TypeError.
    """
    module_name, _, name = target.partition(":")
    name, colon, argument = name.partition(":")
    found = getattr(_module(module_name), name)
    function: Callable[..., Any] = found(argument) if colon else found
    if not callable(function):
        raise TypeError(f"{name} is not callable")
    return function


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    file = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
