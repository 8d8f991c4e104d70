"""A small recipe of real models run by the command, and what it leaves."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from test_cli import STUDY

HEADWATER = [sys.executable, "-m", "headwater", "run"]


def study_file(folder: Path, steps: int) -> Path:
    """A recipe of real models, with so many steps of GRPO."""
    path = folder / "study.yaml"
    path.write_text(STUDY.replace("grpo: {steps: 2,", f"grpo: {{steps: {steps},"))
    return path


def made(out: Path) -> dict[str, Any]:
    """Tables without times, weights, rollouts and attempts of a run, by file."""
    found: dict[str, Any] = {}
    for table in out.glob("tables/*.csv"):
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found[table.name] = [
            {name: value for name, value in row.items() if name != "stage time"} for row in rows
        ]
    for pattern in ("*/model/*.safetensors", "*/rollouts.parquet", "*/attempts.parquet"):
        for path in out.glob(f"artifacts/{pattern}"):
            found[path.relative_to(out).as_posix()] = path.read_bytes()
    return found
