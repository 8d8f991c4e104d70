"""What is written to a terminal with: styles that read on light and dark, consoles that fit.

Colours are asked for by FORCE_COLOR and refused by NO_COLOR, TERM=dumb and a stream that is no
terminal. Nothing is drawn over itself in a log: see `redraws`.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

# Colours of the 256 whose contrast with white and with black are both above 3.8, and which on
# sixteen colours become neither yellow nor white.
GOOD = "color(28)"  # green
BAD = "bold color(160)"  # red
CAUTION = "color(163)"  # magenta
QUIET = "color(243)"  # grey
TEACHER = "color(163)"
STUDENT = "color(31)"  # blue
HEADING = "bold"
NAME = "bold color(31)"

_LINE = 200  # columns of a table where there is no terminal to say so


def stdout_console() -> Console:
    """For results. Sentences are broken in a terminal only, so that a file of them can be read."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """For progress and remarks."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    shown = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if shown else _LINE
    return Console(stderr=stderr, highlight=False, width=width, soft_wrap=not shown)


def redraws(console: Console) -> bool:
    """Whether a display may draw over itself: in a terminal that can, and not in a log of CI."""
    return console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("CI")
