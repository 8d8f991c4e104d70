"""How often `headwater pilot` advises rightly where the answer is known: three embedded worlds.

    python benchmarks/pilot.py --out runs/pilots --seeds 10-19
    python benchmarks/pilot.py --out runs/pilots --seeds 10-13 --truth

The worlds are those of recipes/pilot-embedded.yaml. A seed makes other base models, divides the
problems anew and draws other samples; the three worlds of a seed share a folder and what is in it.
Without --truth each world is piloted once a seed, and the advice is compared with what the world
is. A base model does not always become what its world is named after; with --truth both arms are
trained as well, and the advice is compared with what came out: bridge minus cold GRPO, too close
within 5 points. Differences of a world have a 95 % interval of Student's t over the seeds.
Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from headwater import api
from headwater.evals.variance import t_quantile

RECIPE = "pilot-embedded"
#: World -> its profile and the advice that is right where it is what it is named after.
WORLDS = {
    "wins": (None, ("bridge", "half_split")),
    "ties": ("ties", ("too_close",)),
    "loses": ("loses", ("cold_grpo",)),
}
#: Points by which trained arms must differ for one of them to have been the right advice.
CLOSE = 5.0


def main() -> None:
    """Pilot, or measure, every world at every seed, and print a line each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seeds", default="10-19", help="first-last")
    arguments.add_argument("--worlds", default=",".join(WORLDS), help="which, by name")
    arguments.add_argument("--truth", action="store_true", help="train both arms as well")
    given = arguments.parse_args()
    first, last = map(int, given.seeds.split("-"))
    worlds = given.worlds.split(",")
    right: dict[str, list[bool]] = {world: [] for world in worlds}
    gaps: dict[str, list[float]] = {world: [] for world in worlds}
    for seed in range(first, last + 1):
        for world in worlds:
            out = given.out / f"seed-{seed}"
            wanted = WORLDS[world][1]
            if given.truth:
                gaps[world].append(_gap(world, seed, out))
                wanted = _right_by(gaps[world][-1])
            right[world].append(_advice(world, seed, out) in wanted)
            print(f"  {'right' if right[world][-1] else 'WRONG'}", flush=True)
    for world in worlds:
        measured = f"; {_interval(gaps[world])}" if given.truth else ""
        print(f"{world}: {sum(right[world])} of {len(right[world])} advised rightly{measured}")


def _overrides(seed: int) -> list[str]:
    return [f"seeds=[{seed}]", f"pools.seed={seed}", "compute.processes=1"]


def _right_by(gap: float) -> tuple[str, ...]:
    if abs(gap) <= CLOSE:
        return ("too_close",)
    return ("bridge", "half_split") if gap > 0 else ("cold_grpo",)


def _advice(world: str, seed: int, out: Path) -> str:
    began = time.monotonic()
    profile = WORLDS[world][0]
    found = api.pilot(RECIPE, out, profile=profile, overrides=_overrides(seed), quiet=True).found
    assert found.lead is not None
    print(
        f"{world} seed {seed}: {found.advice.verdict}; projected lead "
        f"{100 * found.lead.mean:+.1f} ({100 * found.lead.low:+.1f} to "
        f"{100 * found.lead.high:+.1f}); pass rates {found.teacher.rates.pass_rate.mean:.3f} "
        f"{found.student.rates.pass_rate.mean:.3f}; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return str(found.advice.verdict)


def _gap(world: str, seed: int, out: Path) -> float:
    result = api.run(RECIPE, out, profile=WORLDS[world][0], overrides=_overrides(seed), quiet=True)
    rates = {row.arm: row.avg_at_k for row in result.results.rows if row.evaluates == "student"}
    gap = 100 * (rates["bridge"] - rates["cold_grpo"])
    print(
        f"{world} seed {seed}: bridge {100 * rates['bridge']:.1f}, cold GRPO "
        f"{100 * rates['cold_grpo']:.1f}, difference {gap:+.1f}",
        flush=True,
    )
    return gap


def _interval(gaps: list[float]) -> str:
    mean = statistics.fmean(gaps)
    if len(gaps) < 2:
        return f"difference {mean:+.1f} points, one seed"
    half = t_quantile(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    ends = f"{mean - half:+.1f} to {mean + half:+.1f}"
    return f"difference {mean:+.1f} points ({ends}), {len(gaps)} seeds"


if __name__ == "__main__":
    main()
