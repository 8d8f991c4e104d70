"""How often `headwater pilot` advises rightly where the answer is known: three embedded worlds.

    python benchmarks/pilot.py --out runs/pilots --seeds 10-19
    python benchmarks/pilot.py --out runs/pilots --seeds 10-13 --truth

The worlds are those of recipes/pilot-embedded.yaml. A seed makes other base models, divides the
problems anew and draws other samples; the three worlds of a seed share a folder and what is in it.
Without --truth each world is piloted once a seed, and the advice is compared with what the world
is. With --truth both arms are trained, which says what it is: bridge minus cold GRPO, with a 95 %
interval of Student's t over the seeds. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from headwater import api
from headwater.evals.variance import t_quantile

RECIPE = "pilot-embedded"
#: World -> its profile and the advice that is right.
WORLDS = {
    "wins": (None, ("bridge", "half_split")),
    "ties": ("ties", ("too_close",)),
    "loses": ("loses", ("cold_grpo",)),
}


def main() -> None:
    """Pilot, or measure, every world at every seed, and print a line each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seeds", default="10-19", help="first-last")
    arguments.add_argument("--worlds", default=",".join(WORLDS), help="which, by name")
    arguments.add_argument("--truth", action="store_true", help="train both arms")
    given = arguments.parse_args()
    first, last = map(int, given.seeds.split("-"))
    work = _gap if given.truth else _advised
    found: dict[str, list[float]] = {world: [] for world in given.worlds.split(",")}
    for seed in range(first, last + 1):
        for world in found:
            found[world].append(work(world, seed, given.out / f"seed-{seed}"))
    for world, values in found.items():
        print(f"{world}: {_interval(values) if given.truth else _counted(values)}")


def _overrides(seed: int) -> list[str]:
    return [f"seeds=[{seed}]", f"pools.seed={seed}", "compute.processes=1"]


def _advised(world: str, seed: int, out: Path) -> float:
    profile, right = WORLDS[world]
    began = time.monotonic()
    found = api.pilot(RECIPE, out, profile=profile, overrides=_overrides(seed), quiet=True).found
    assert found.lead is not None
    is_right = found.advice.verdict in right
    print(
        f"{world} seed {seed}: {found.advice.verdict}, {'right' if is_right else 'WRONG'}; lead "
        f"{100 * found.lead.mean:+.1f} ({100 * found.lead.low:+.1f} to "
        f"{100 * found.lead.high:+.1f}); pass rates {found.teacher.rates.pass_rate.mean:.3f} "
        f"{found.student.rates.pass_rate.mean:.3f}; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return float(is_right)


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
        return f"{mean:+.1f} points, one seed"
    half = t_quantile(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{mean:+.1f} points ({mean - half:+.1f} to {mean + half:+.1f}), {len(gaps)} seeds"


def _counted(right: list[float]) -> str:
    return f"{sum(right):.0f} of {len(right)} advised rightly"


if __name__ == "__main__":
    main()
