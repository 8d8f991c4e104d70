"""headwater: post-train small language models with few labels.

`headwater.api` has the command line's verbs as functions that return records; it is imported
when first used, and torch with the first stage that runs.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__version__ = "0.2.0"


def __getattr__(name: str) -> ModuleType:
    if name == "api":
        return import_module("headwater.api")
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")
