"""Colours on light and dark, streams that are no terminals, and what the command line offers."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.style import Style

from headwater import terminal

STYLES = {
    name: value
    for name, value in vars(terminal).items()
    if name.isupper() and not name.startswith("_") and isinstance(value, str)
}
HARD_TO_READ = {3, 7, 11, 15}  # yellow and white of the sixteen, whatever a theme makes of them


def contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Of two colours, from 1 to 21, as the W3C's accessibility guidelines reckon it."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: tuple[int, int, int]) -> float:
    shares = [value / 255 for value in colour]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", STYLES)
def test_every_style_reads_on_white_and_on_black(name: str) -> None:
    style = Style.parse(STYLES[name])
    assert style.bgcolor is None  # the terminal's own
    if style.color is not None:
        shown = tuple(style.color.get_truecolor())
        assert contrast(shown, (255, 255, 255)) > 3.8
        assert contrast(shown, (0, 0, 0)) > 3.8


def test_the_contrast_is_that_of_the_guidelines() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((255, 255, 0), (255, 255, 255)) < 1.1  # bright yellow on white


def in_a_terminal(code: str, **environment: str) -> str:
    """What the code writes where its output is a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    settings = {"TERM": "xterm-256color", "COLUMNS": "80", **kept, **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, stdin=theirs, env=settings
    )
    os.close(theirs)
    pieces = []
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            piece = b""
        if not piece:
            break
        pieces.append(piece)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return b"".join(pieces).decode()


SAY = """
from headwater.terminal import GOOD, redraws, stderr_console, stdout_console
stdout_console().print("right", style=GOOD)
console = stderr_console()
print(console.width, redraws(console))
"""


def test_a_terminal_has_colours_and_a_live_display() -> None:
    assert in_a_terminal(SAY) == "\x1b[38;5;28mright\x1b[0m\r\n80 True\r\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NO_COLOR": "1"}, "right\r\n80 True\r\n"),
        ({"TERM": "dumb"}, "right\r\n80 False\r\n"),
        ({"CI": "true"}, "\x1b[38;5;28mright\x1b[0m\r\n80 False\r\n"),
    ],
)
def test_what_the_environment_asks_for_is_heeded(
    environment: dict[str, str], expected: str
) -> None:
    assert in_a_terminal(SAY, **environment) == expected


@pytest.mark.parametrize(("environment", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True)])
def test_a_pipe_is_plain_unless_colours_are_asked_for(
    environment: dict[str, str], coloured: bool
) -> None:
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SAY],
        env={"TERM": "xterm-256color", **kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    first = "\x1b[38;5;28mright\x1b[0m\n" if coloured else "right\n"
    assert done.stdout == f"{first}200 False\n"  # lines long enough, and nothing drawn over


@pytest.mark.parametrize("name", STYLES)
def test_sixteen_colours_are_enough(name: str) -> None:
    console = Console(file=io.StringIO(), color_system="standard", force_terminal=True)
    style = console.get_style(STYLES[name])
    colour = style.color or Color.default()
    assert colour.downgrade(ColorSystem.STANDARD).number not in HARD_TO_READ
