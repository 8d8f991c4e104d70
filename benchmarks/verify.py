"""Verdicts per second of the `math` verifier: common answers, with algebra, with hostile ones.

  python benchmarks/verify.py --workers 2 --rounds 3

README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

import answers
from answers import Sample
from compare import machine
from headwater.types import Verdict
from headwater.verify.verifiers import Verifier, make_verifier

OURS = "headwater"
PEER = "math_verify"
#: Two answers whose comparison starts the workers.
WARM_UP = [(rf"\boxed{{\sin({n}x)^2+\cos({n}x)^2}}", "1") for n in (3, 4)]

Grader = Callable[[Sequence[Sample]], list[Verdict]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run. Shares are of a whole batch, times are seconds of one case."""

    count: int
    hostile_batch: int
    peer_count: int
    algebra_share: float
    hostile_share: float
    workers: int
    timeout: float
    hostile_timeout: float
    rounds: int
    seed: int
    data: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One grader on one batch.

    `unavoidable_seconds` is what no schedule can be quicker than; `changed` counts verdicts that
    differ from those without hostile answers beside them.
    """

    batch: str
    grader: str
    samples: int
    seconds: float
    counts: dict[str, int]
    unlike_made: int
    unavoidable_seconds: float | None = None
    changed: int | None = None
    verdicts: list[Verdict] = field(default_factory=list, repr=False)

    def record(self) -> dict[str, object]:
        """What goes on the JSON line."""
        values = asdict(self)
        del values["verdicts"]
        return values | {"verdicts_per_second": round(self.samples / self.seconds, 1)}


def measure(
    batch: str, grader: str, grade: Grader, samples: Sequence[Sample], rounds: int
) -> Measured:
    """Median seconds of grading a batch, and the verdicts of the last round."""
    times = []
    for _ in range(rounds):
        since = time.perf_counter()
        verdicts = grade(samples)
        times.append(time.perf_counter() - since)
    unlike = sum(
        (verdict is Verdict.CORRECT) != sample.right
        for verdict, sample in zip(verdicts, samples, strict=True)
    )
    counts = {verdict.value: count for verdict, count in sorted(Counter(verdicts).items())}
    return Measured(batch, grader, len(samples), median(times), counts, unlike, verdicts=verdicts)


def ordinary(settings: Settings, count: int, algebra_share: float, seed: int) -> list[Sample]:
    """Common answers with a share that needs algebra."""
    rng = random.Random(seed)
    hard = round(count * algebra_share)
    if settings.data is None:
        easy = answers.common(count - hard, rng)
    else:
        easy = answers.of_problems(settings.data, count - hard, rng)
    return answers.mixed(easy, answers.algebra(hard, rng), rng)


def our_grader(verifier: Verifier) -> Grader:
    """Grade with a verifier whose workers have started."""
    verifier.grade(WARM_UP)
    return lambda samples: verifier.grade([(item.completion, item.gold) for item in samples])


def peer_grader() -> Grader | None:
    """Math-Verify as its README calls it, in this process; None where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def grade(samples: Sequence[Sample]) -> list[Verdict]:
        found = [verify(parse(f"${item.gold}$"), parse(item.completion)) for item in samples]
        return [Verdict.CORRECT if right else Verdict.INCORRECT for right in found]

    grade(answers.common(20, random.Random(0)))
    return grade


def measure_ordinary(settings: Settings) -> list[Measured]:
    """Common answers, and mixed with algebra; the peer on the first ones of each."""
    easy = Path(settings.data or "common").name
    batches = [
        (easy, ordinary(settings, settings.count, 0.0, settings.seed)),
        (
            f"{settings.algebra_share:.1%} algebra",
            ordinary(settings, settings.count, settings.algebra_share, settings.seed + 1),
        ),
    ]
    found = []
    peer = peer_grader() if settings.peer_count else None
    with make_verifier(
        "math", workers=settings.workers, timeout_seconds=settings.timeout
    ) as verifier:
        grade = our_grader(verifier)
        for name, samples in batches:
            found.append(measure(name, OURS, grade, samples, settings.rounds))
            if peer is not None:
                found.append(measure(name, PEER, peer, samples[: settings.peer_count], 1))
    return found


def measure_hostile(settings: Settings) -> list[Measured]:
    """The ordinary answers of a hostile batch, and the whole of it."""
    rng = random.Random(settings.seed + 2)
    count = round(settings.hostile_batch * settings.hostile_share)
    rest = ordinary(
        settings, settings.hostile_batch - count, settings.algebra_share, settings.seed + 3
    )
    whole = answers.mixed(rest, answers.hostile(count, rng), rng)
    places = {id(sample): place for place, sample in enumerate(whole)}
    share = f"{settings.hostile_share:.0%} hostile"
    alone, company = (
        _fresh(name, samples, settings)
        for name, samples in ((f"{share}: the others", rest), (share, whole))
    )
    beside = [company.verdicts[places[id(sample)]] for sample in rest]
    changed = sum(one is not other for one, other in zip(alone.verdicts, beside, strict=True))
    limited = company.counts.get(Verdict.TIMEOUT.value, 0)
    bound = limited * settings.hostile_timeout / settings.workers + alone.seconds
    return [alone, replace(company, unavoidable_seconds=bound, changed=changed)]


def _fresh(name: str, samples: Sequence[Sample], settings: Settings) -> Measured:
    """Measured with workers that have seen none of it."""
    with make_verifier(
        "math", workers=settings.workers, timeout_seconds=settings.hostile_timeout
    ) as verifier:
        return measure(name, OURS, our_grader(verifier), samples, settings.rounds)


def table(results: Sequence[Measured]) -> Table:
    """A row for each grader on each batch."""
    found = Table(title="grading: verdicts per second")
    for heading in ("batch", "by", "verdicts", "seconds", "per second", "timeout", "unlike made"):
        found.add_column(heading, justify="left" if heading in ("batch", "by") else "right")
    found.add_column("unavoidable s", justify="right")
    found.add_column("x", justify="right")
    found.add_column("changed", justify="right")
    for one in results:
        bound = one.unavoidable_seconds
        limits = ["", "", ""]
        if bound is not None:
            limits = [f"{bound:.2f}", f"{one.seconds / bound:.2f}", str(one.changed)]
        found.add_row(
            *(one.batch, one.grader, str(one.samples), f"{one.seconds:.2f}"),
            f"{one.samples / one.seconds:,.0f}",
            *(str(one.counts.get(Verdict.TIMEOUT.value, 0)), str(one.unlike_made), *limits),
        )
    return found


def parse(arguments: Sequence[str]) -> tuple[Settings, bool]:
    """Settings, and whether to print JSON lines, from a command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000, help="verdicts of a batch")
    parser.add_argument("--hostile-batch", type=int, default=1_000, help="of the hostile batch")
    parser.add_argument("--peer-count", type=int, default=1_000, help="of the peer; 0: no peer")
    parser.add_argument("--algebra-share", type=float, default=0.075)
    parser.add_argument("--hostile-share", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds a case may take")
    parser.add_argument("--hostile-timeout", type=float, default=1.0, help="in the hostile batch")
    parser.add_argument("--rounds", type=int, default=1, help="medians over this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="PATH", help="common answers: this problem file's golds")
    parser.add_argument("--json", action="store_true", help="print a JSON line per row instead")
    found = vars(parser.parse_args(arguments))
    as_json = found.pop("json")
    return Settings(**found), as_json


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    settings, as_json = parse(arguments)
    where = machine()
    console = Console(highlight=False, soft_wrap=True, width=max(120, Console().width))
    if where["load"] > 0.5 and not as_json:
        console.print(
            f"load average {where['load']}: expected an idle machine; times are not clean"
        )
    results = [*measure_ordinary(settings), *measure_hostile(settings)]
    if as_json:
        for one in results:
            print(json.dumps(one.record() | {"machine": where, "settings": asdict(settings)}))
    else:
        console.print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
