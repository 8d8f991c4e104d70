"""A grading function that tells what is in its environment; in a module without tests."""

from __future__ import annotations

import os


def names_in_environment(text: str) -> str:
    return " ".join(os.environ)
