"""The pictures of the docs, from a run: python docs/site/screenshots.py runs/quickstart

report.png by a headless Chromium (`chromium` on the path), terminal.svg by rich.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from headwater import api, console

IMAGES = Path(__file__).parents[1] / "images"
WIDTH, HEIGHT = 1280, 1500


def report(run: Path) -> None:
    """The upper part of a run's page."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-background-networking", f"--user-data-dir={profile}"),
                *(f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={IMAGES / 'report.png'}"),
                (run / "report.html").resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def terminal(run: Path) -> None:
    """What a run's last words look like."""
    recorder = Console(record=True, width=128, file=io.StringIO(), highlight=False)
    console.show_report(recorder, api.report(run))
    svg = recorder.export_svg(title=f"headwater run {run.name}")
    # the reader's own monospace: nothing is fetched from elsewhere
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    (IMAGES / "terminal.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    report(Path(sys.argv[1]))
    terminal(Path(sys.argv[1]))
