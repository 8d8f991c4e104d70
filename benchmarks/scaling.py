"""How a step's time and memory grow: one size at a time, the others as in the `grpo` workload.

  python benchmarks/scaling.py prompt completion

Prints a Markdown table and appends a JSON line per run. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare import machine, run

#: Axis -> its option of step.py and the values it takes; `vocabulary` changes the model's shape.
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "group": ("--group", (2, 4, 8, 16)),
    "completion": ("--completion-len", (32, 64, 128, 256)),
    "prompt": ("--prompt-len", (32, 64, 128, 256, 512)),
    "vocabulary": ("--model", (16_384, 49_152, 131_072, 262_144)),
    "batch": ("--batch", (8, 16, 32, 64)),
}
COLUMNS = (
    ("sampling s", "mean_generate_s"),
    ("training s", "mean_train_s"),
    ("peak MiB", "peak_rss_mib"),
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What every run has in common."""

    kind: str
    model: str
    teacher: str | None
    steps: int
    warmup: int
    threads: int
    device: str
    workdir: Path

    def command(self, axis: str, value: int) -> list[str]:
        """Command line of step.py with one size changed; of a group of 16, 16 completions."""
        option, _ = AXES[axis]
        sizes = {"--model": self.model, "--batch": "16", "--group": "8"}
        sizes |= {"--prompt-len": "64", "--completion-len": "64"}
        if self.teacher is not None:
            sizes["--teacher"] = self.teacher
        if axis == "vocabulary":
            for role in {"--model", "--teacher"} & sizes.keys():
                sizes[role] = f"{sizes[role].partition('?')[0]}?vocab={value}"
        else:
            sizes[option] = str(value)
        numbers = {"--steps": self.steps, "--warmup": self.warmup, "--threads": self.threads}
        where = {"--device": self.device, "--workdir": self.workdir, "--roofline": 0}
        options = [str(item) for pair in (sizes | numbers | where).items() for item in pair]
        return [sys.executable, str(Path(__file__).with_name("step.py")), self.kind, *options]


def rows(sweep: Sweep, axis: str, out: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Value and record of every run along one axis."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for value in AXES[axis][1]:
        where = machine()
        record = run(sweep.command(axis, value), sweep.threads)
        with out.open("a", encoding="utf-8") as file:
            line = {"axis": axis, "value": value, "machine": where, "result": record}
            file.write(json.dumps(line) + "\n")
        yield value, record


def parse(arguments: Sequence[str]) -> tuple[list[str], Sweep, Path]:
    """Axes, what every run has in common, and the file to append to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--kind", choices=("grpo", "opd", "warmup"), default="grpo")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--teacher", help="for opd and warmup; default: the model's shape")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, help="default: WORKDIR/scaling.jsonl")
    found = parser.parse_args(arguments)
    unknown = [axis for axis in found.axes if axis not in AXES]
    if unknown:
        parser.error(f"no axis {unknown[0]!r}; choose from {', '.join(AXES)}")
    teacher = None if found.kind == "grpo" else found.teacher or found.model
    sweep = Sweep(
        kind=found.kind,
        model=found.model,
        teacher=teacher,
        steps=found.steps,
        warmup=found.warmup,
        threads=found.threads,
        device=found.device,
        workdir=found.workdir,
    )
    return found.axes or list(AXES), sweep, found.out or found.workdir / "scaling.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 when a run fails."""
    axes, sweep, out = parse(arguments)
    print(f"| axis | value | {' | '.join(name for name, _ in COLUMNS)} |")
    print(f"| --- | ---: | {' | '.join('---:' for _ in COLUMNS)} |")
    for axis in axes:
        try:
            for value, record in rows(sweep, axis, out):
                seconds = [f"{record[key]:.2f}" for _, key in COLUMNS[:2]]
                cells = (axis, str(value), *seconds, f"{record[COLUMNS[2][1]]:.0f}")
                print(f"| {' | '.join(cells)} |", flush=True)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
