"""What was meant by a misspelt name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near(name: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` where a known name is near, else nothing: to end a message with.

    >>> near("grop", ["sft", "grpo"]), near("frob", ["sft", "grpo"])
    ("; did you mean 'grpo'?", '')
    """
    found = get_close_matches(str(name), [str(one) for one in known], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def choose(name: object, known: Iterable[object]) -> str:
    """A cure for a name that is none: the one near it, or all there are.

    >>> choose("grop", ["sft", "grpo"]), choose("frob", ["sft", "grpo"])
    ("did you mean 'grpo'?", 'choose from sft, grpo')
    """
    names = [str(one) for one in known]
    return near(name, names).removeprefix("; ") or f"choose from {', '.join(names) or 'none'}"
