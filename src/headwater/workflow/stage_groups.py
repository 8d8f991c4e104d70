"""Stages of a plan that differ only in seed and arm, taken together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from headwater.ledger.spending import Spending
from headwater.workflow.devices import DeviceNeed
from headwater.workflow.estimate import StageEstimate


@dataclass(frozen=True, slots=True)
class StageGroup:
    """Stages of one kind, model and pool. `spending` is of all of them; `largest` needs most."""

    kind: str
    model: str
    pool: str | None
    stages: int
    cached: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    spending: Spending
    largest: DeviceNeed | None
    device_hours: float


def grouped(stages: Iterable[StageEstimate]) -> tuple[StageGroup, ...]:
    """Groups in the order of their first stages.

    Labels and peak memory of a group are the largest of a stage: seeds read the same labels.
    """
    found: dict[tuple[str, str, str | None], list[StageEstimate]] = {}
    for stage in stages:
        found.setdefault((stage.kind, stage.model, stage.pool), []).append(stage)
    return tuple(_group(members) for members in found.values())


def _group(members: list[StageEstimate]) -> StageGroup:
    first = members[0]
    needs = [stage.devices for stage in members if stage.devices is not None]
    return StageGroup(
        kind=first.kind,
        model=first.model,
        pool=first.pool,
        stages=len(members),
        cached=sum(stage.cached for stage in members),
        seeds=tuple(sorted({stage.seed for stage in members})),
        arms=tuple(dict.fromkeys(arm for stage in members for arm in stage.arms)),
        spending=_together([stage.spending for stage in members]),
        largest=max(needs, key=lambda need: (need.devices, need.bytes_per_device), default=None),
        device_hours=sum(need.device_hours for need in needs),
    )


def _together(spendings: list[Spending]) -> Spending:
    largest = ("labels", "peak_memory_bytes")
    return Spending(
        **{
            field.name: (max if field.name in largest else sum)(
                getattr(spending, field.name) for spending in spendings
            )
            for field in fields(Spending)
        }
    )
