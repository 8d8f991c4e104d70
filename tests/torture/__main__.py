"""`python -m torture`: random faults against small real runs, and a table of what came of them.

Run with PYTHONPATH=tests, or by `make torture`. Exits with 1 when any run ended otherwise than an
undisturbed one, or said something else than the fault warrants; its folder is then kept.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from torture.campaign import FAULTS, Tally, reference_run, run_lanes
from torture.processes import preload
from torture.study import make_study


def main() -> int:
    """Torture, print, and say by the exit code whether anything was lost."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to go on")
    parser.add_argument("--kills", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--lanes", type=int, default=2, help="runs tortured at once")
    parser.add_argument("--seed", default=None, help="repeats a campaign's choices of faults")
    parser.add_argument("--faults", default="", help="only those that begin with this")
    parser.add_argument("--small", action="store_true", help="one arm only: shorter runs")
    given = parser.parse_args()
    seed = given.seed or str(secrets.randbelow(10**6))
    print(f"seed {seed}", flush=True)
    faults = tuple(name for name in FAULTS if name.startswith(given.faults))
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    preload()
    study = make_study(processes=2, small=given.small)
    reference = reference_run(study, root / "reference")
    print(
        f"undisturbed: {len(study.graph.nodes)} stages in {reference.seconds:.1f} s, "
        f"{reference.writes['run']} writes by the run, {reference.writes['worker']} by its first "
        "worker",
        flush=True,
    )
    began = time.monotonic()
    tally = run_lanes(
        study,
        reference,
        root,
        seed=seed,
        seconds=given.seconds,
        kills=given.kills,
        lanes=given.lanes,
        faults=faults,
    )
    show(tally, faults, time.monotonic() - began)
    if tally.problems:
        print(f"\nkept: {root}")
        return 1
    shutil.rmtree(root)
    return 0


def show(tally: Tally, faults: tuple[str, ...], seconds: float) -> None:
    """Print every fault with its counts, and what went wrong."""
    print(f"{'fault':32} {'tried':>6} {'survived':>9} {'differences':>12}")
    for name in faults:
        counts = (tally.tried[name], tally.survived[name], tally.differences[name])
        print(f"{name:32} {counts[0]:6} {counts[1]:9} {counts[2]:12}")
    print(f"{tally.kills} kills, {tally.finished} runs to the end, in {seconds:.0f} s")
    for problem in tally.problems:
        print(f"\n{problem}")


if __name__ == "__main__":
    sys.exit(main())
