"""What kind of arm a route is: the paper's axes, and the families a long list is read by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from headwater.report.results import Results, Route, Row

FULL_POOL = "labels"
_NOT_HALVES = (FULL_POOL, "prompts", "worked", "validation")

Transfer = Literal["bridge", "OPD only", "teacher-sample SFT"]
Taught = Literal["raw", "SFT'd", "RL'd"]
TRANSFERS: Mapping[tuple[str, ...], Transfer] = {
    ("warmup", "opd"): "bridge",
    ("opd",): "OPD only",
    ("sample_sft",): "teacher-sample SFT",
}
TAUGHT: Mapping[tuple[str, ...], Taught] = {(): "raw", ("sft",): "SFT'd", ("grpo",): "RL'd"}

FAMILIES: Mapping[str, str] = {
    "base": "Untrained",
    "direct": "Trained on the labels directly",
    "bridge": "Bridges",
    "transfer": "Other transfers",
    "stage 3": "Transfer, then labels on the student",
    "matched": "Made equal on one account",
    "teacher": "Teachers of these arms",
    "map": "Cells of the map",
    "other": "Others",
}
FOLDED = frozenset({"matched", "teacher", "map"})


def kind_of(stage: str) -> str:
    """The kind of a stage written KIND(POOL).

    >>> kind_of("grpo(1H)"), pool_of("grpo(1H)")
    ('grpo', '1H')
    """
    return stage.partition("(")[0]


def pool_of(stage: str) -> str:
    """The pool of a stage written KIND(POOL)."""
    return stage.partition("(")[2].removesuffix(")")


@dataclass(frozen=True, slots=True)
class Axes:
    """Where an arm with known stages stands: how its teacher was made, how it learned from it.

    transfer is None without a teacher. pools: those of the teacher's stages; then: (kind, pool) of
    the stages that read no teacher.
    """

    student: str
    teacher: str | None
    taught: Taught | None
    transfer: Transfer | None
    pools: tuple[str, ...]
    then: tuple[tuple[str, str], ...]


class Families:
    """Every arm of a run by its route, never by its name."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.routes: Mapping[str, Route] = {route.arm: route for route in results.routes}

    @cached_property
    def siblings(self) -> frozenset[str]:
        """Arms that exist only to equal another one on an account."""
        firsts: dict[tuple[object, ...], str] = {}
        for route in self._results.routes:
            firsts.setdefault(_shape(route), route.arm)
        matched = {row.than for row in self._results.differences if row.match}
        return frozenset(
            arm for arm in matched if arm in self.routes and firsts[_shape(self.routes[arm])] != arm
        )

    @cached_property
    def halves(self) -> tuple[str, ...]:
        """Parts of the labels that GRPO reads, in the order of the run's pools."""
        read = {
            pool_of(stage)
            for route in self._results.routes
            for stage in (*route.taught_by, *route.others)
            if kind_of(stage) == "grpo"
        }
        return tuple(
            pool for pool in self._results.pools if pool in read and pool not in _NOT_HALVES
        )

    def family(self, row: Row) -> str:
        """A key of FAMILIES."""
        route = self.routes.get(row.arm)
        if route is None:
            return "other" if row.chain else "base"
        if row.evaluates == "teacher" and route.teacher_base is not None:
            return "teacher"
        if row.arm in self.siblings:
            return "matched"
        if any(":" in pool_of(stage) for stage in (*route.taught_by, *route.others)):
            return "map"
        if route.teacher_base is None:
            return "direct" if route.others else "base"
        if "grpo" in map(kind_of, route.others):
            return "stage 3"
        axes = axes_of(route)
        return "bridge" if axes is not None and axes.transfer == "bridge" else "transfer"

    def ordinary(self) -> Iterable[tuple[Route, Axes]]:
        """Routes of the study's own arms that lie on the paper's axes: no siblings, no cells."""
        for route in self._results.routes:
            axes = axes_of(route)
            pools = [pool_of(stage) for stage in (*route.taught_by, *route.others)]
            if axes and route.arm not in self.siblings and not any(":" in pool for pool in pools):
                yield route, axes


def axes_of(route: Route) -> Axes | None:
    """Where a route stands, or None where it is none of the paper's."""
    then = tuple((kind_of(stage), pool_of(stage)) for stage in route.others)
    if route.teacher_base is None:
        return Axes(route.base, None, None, None, (), then)
    transfer = TRANSFERS.get(tuple(map(kind_of, route.transfers)))
    taught = TAUGHT.get(tuple(map(kind_of, route.taught_by)))
    if transfer is None or taught is None:
        return None
    pools = tuple(map(pool_of, route.taught_by))
    return Axes(route.base, route.teacher_base, taught, transfer, pools, then)


def _shape(route: Route) -> tuple[object, ...]:
    """A route without the number of labels it reads: equal for an arm and its siblings."""
    stages = (route.taught_by, route.transfers, route.others)
    return (
        route.base,
        route.teacher_base,
        *(tuple(stage.partition(":")[0].rstrip(")") for stage in part) for part in stages),
    )
