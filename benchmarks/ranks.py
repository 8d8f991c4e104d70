"""Seconds of a step against the number of processes that share it, in real runs of a recipe.

  python benchmarks/ranks.py                                  # cold GRPO of the quickstart
  python benchmarks/ranks.py RECIPE --arms bridge --kinds grpo opd --ranks 1 2 -- --set a.b=c

What follows -- goes to headwater run.

Each number of processes is a run of its own, one after another, with one thread a process; the
means leave out the first step of every stage. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

PARTS = ("sampling_seconds", "training_seconds")


def run(recipe: str, arms: str, ranks: int, out: Path, more: list[str]) -> None:
    """The recipe's arms with so many processes a stage."""
    command = [sys.executable, "-m", "headwater", "run", recipe, "--out", str(out), "--arms", arms]
    command += ["--nproc", str(ranks), "--set", "compute.processes=1"]
    command += ["--set", "compute.threads=1", *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def steps_of(out: Path, kind: str) -> list[dict[str, float]]:
    """Metrics of the steps of every stage of a kind, but for its first."""
    rows: list[dict[str, float]] = []
    for manifest in out.glob("artifacts/*/manifest.json"):
        if json.loads(manifest.read_text())["kind"] == kind:
            lines = (manifest.parent / "metrics.jsonl").read_text().splitlines()
            rows += [json.loads(line) for line in lines[1:]]
    return rows


def main() -> None:
    """Prints a Markdown row for each kind of stage and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--arms", default="cold_grpo")
    parser.add_argument("--kinds", nargs="+", default=["grpo"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    asked, more = parser.parse_args(given[:end]), given[end + 1 :]
    print("| stage | processes | sampling, s | training, s | tokens/s | gradient norm, last |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in asked.ranks:
            out = Path(folder) / str(ranks)
            run(asked.recipe, asked.arms, ranks, out, more)
            for kind in asked.kinds:
                rows = steps_of(out, kind)
                sampling, training = (fmean(row[part] for row in rows) for part in PARTS)
                rate = fmean(row["tokens_per_second"] for row in rows)
                print(
                    f"| {kind} | {ranks} | {sampling:.2f} | {training:.2f} | {rate:,.0f} "
                    f"| {rows[-1]['grad_norm']:.4f} |"
                )


if __name__ == "__main__":
    main()
