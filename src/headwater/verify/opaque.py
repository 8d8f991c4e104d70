"""Which of the answers that cannot be taken apart here are worth a computer algebra system."""

from __future__ import annotations

import re

from headwater.verify.splitting import split_at

_BEYOND_EXPRESSIONS = re.compile(
    r"\\(?:int|sum|prod|lim|begin|setminus|cap|cup|mathbb|det)(?![a-zA-Z])"
)
_COMMAND = re.compile(r"\\((?:begin|end) ?\{[a-zA-Z]*\}|[a-zA-Z]+|.)", re.DOTALL)
_COMMANDS = frozenset(
    {
        "frac", "sqrt", "binom", "int", "sum", "prod", "lim", "infty", "pi", "cdot", "times", "div",
        "le", "ge", "ne", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan",
        "ln", "log", "exp", "cup", "cap", "setminus", "mathbb", "det", "to", "alpha", "beta",
        "theta", "phi", "lambda", "\\", "{", "}",
    }
    | {f"{edge}{{{kind}matrix}}" for edge in ("begin", "end") for kind in ("", "p", "b", "v")}
)  # fmt: skip
_ADMITTED = re.compile(r"(?!.*(?:[A-Za-z]{3}|\.\.))[0-9A-Za-z+\-*/^_(){}\[\],.|=&<>! ]*")
_EQUALS = re.compile("=")


def without_common_label(one: str, other: str) -> tuple[str, str]:
    """Both sides without the name in front of `=`, where both give the same thing a value."""
    sides = [split_at(text, _EQUALS) for text in (one, other)]
    if len(sides[0]) == len(sides[1]) == 2 and sides[0][0] == sides[1][0]:
        return sides[0][1], sides[1][1]
    return one, other


def is_for_algebra(*texts: str) -> bool:
    """Whether texts in common notation are calculus, matrices or sets, and nothing besides.

    Math-Verify forgives much (words, dots, half-open brackets), so it only sees texts made of
    mathematics it is known to read.
    """
    return any(map(_BEYOND_EXPRESSIONS.search, texts)) and all(map(_is_admitted, texts))


def _is_admitted(text: str) -> bool:
    if len(split_at(text, _EQUALS)) > 1:
        return False
    return _ADMITTED.fullmatch(_COMMAND.sub(_admitted_command, text)) is not None


def _admitted_command(command: re.Match[str]) -> str:
    return " " if command.group(1) in _COMMANDS else "?"
