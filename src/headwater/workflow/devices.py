"""What a stage needs of a cluster: ranks and servers, memory of each device by part, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from headwater.config.compute import VLLM, Compute, is_served
from headwater.models.size import ModelSize
from headwater.workflow.calibration import GPU, Calibration
from headwater.workflow.device_memory import (
    MOST_ROWS,
    DeviceMemory,
    Placement,
    device_memory,
)
from headwater.workflow.stage_seconds import Fleet, StageSeconds, stage_seconds
from headwater.workflow.stage_work import StageWork

#: Share of a device's memory that a plan fills; the rest is for fragments and the library.
USABLE_SHARE = 0.90
#: Ranks beyond which more shards are not looked at.
_MOST_RANKS = 4096
#: Ranks are doubled, up to the devices there are, while that makes a stage so many times faster.
WORTHWHILE = 1.4
#: What makes a stage fit, as it is set and as `Compute` has it; tried in this order.
RECOMPUTE = "compute.activation_checkpointing=true"
SERVERS = "compute.rollouts=vllm"
_OFFLOAD = "compute.cpu_offload=true"
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    RECOMPUTE: {"activation_checkpointing": True},
    SERVERS: {"rollouts": VLLM()},
    _OFFLOAD: {"cpu_offload": True},
}
_REMEDIES = (
    (RECOMPUTE,),
    (SERVERS,),
    (RECOMPUTE, SERVERS),
    (RECOMPUTE, SERVERS, _OFFLOAD),
)
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Offer:
    """The cluster: memory of one device, devices in all (None: what the largest stage needs) and
    of a node, what they can do, and how the recipe computes on them.

    verifier_workers: of the main rank.
    """

    memory_bytes: int = 80 * _GIB
    count: int | None = None
    per_node: int = 8
    rates: Calibration = GPU
    compute: Compute = field(default_factory=Compute)
    verifier_workers: int = 1
    value_bytes: int = 2
    packs_weights: bool = False  # on a CPU

    @property
    def usable_bytes(self) -> float:
        """What a plan fills of one device, beside what vLLM in the same process takes of it."""
        beside = self.compute.engines_here
        if self.packs_weights:
            return self.memory_bytes * USABLE_SHARE - sum(e.cpu_cache_gib * _GIB for e in beside)
        return self.memory_bytes * (USABLE_SHARE - sum(e.gpu_memory_utilization for e in beside))


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings of `compute` under which a stage fits, as KEY=VALUE, and the fewest ranks then."""

    settings: tuple[str, ...]
    ranks: int


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """A stage on devices.

    smallest: the fewest ranks it fits on, a power of two; None where no number is enough, because
    what every rank holds whole is too large, or where a device's memory is unknown. ranks: those
    planned with; servers: devices of vLLM servers beside them. memory: of the fullest rank.
    remedy: where no number is enough, the settings with which it would fit, and on how many ranks.
    groups: that an update or a batch has to deal out to the ranks.
    """

    smallest: int | None
    ranks: int
    servers: int
    checkpointing: bool
    offload: bool
    memory: DeviceMemory
    seconds: StageSeconds
    generated_tokens: int
    trained_tokens: int
    groups: int
    remedy: Remedy | None = None

    @property
    def fits(self) -> bool:
        """Whether the ranks planned with hold the stage."""
        return self.smallest is not None and self.smallest <= self.ranks

    @property
    def devices(self) -> int:
        """Ranks and servers' devices."""
        return self.ranks + self.servers

    @property
    def bytes_per_device(self) -> int:
        """What the fullest rank holds at most."""
        return self.memory.peak

    @property
    def device_hours(self) -> float:
        """Hours times devices."""
        return self.seconds.total / 3600 * self.devices

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn (or, where none are, learned from) over the whole time of the stage."""
        tokens = self.generated_tokens or self.trained_tokens
        return tokens / max(self.seconds.total, 1e-12)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "memory": self.memory.as_dict(),
            "seconds": asdict(self.seconds) | {"total": self.seconds.total},
            "shares": self.seconds.shares(),
            "fits": self.fits,
            "devices": self.devices,
            "device_hours": self.device_hours,
            "tokens_per_second": self.tokens_per_second,
        }


def device_need(
    work: StageWork, size: ModelSize, beside: ModelSize | None, offer: Offer
) -> DeviceNeed:
    """What `work` on a model of `size` needs.

    beside: the size of a teacher or reference that is held as well. With `compute.ranks` above
    one, or vLLM in the process that trains, the stage gets those ranks; otherwise the fewest it
    fits on, doubled while that pays (`WORTHWHILE`) and the offer has room.
    """
    stage = _Stage(work, size, beside, offer)
    smallest = stage.smallest()
    asked = offer.compute.ranks
    if asked > 1 or offer.compute.engines_here:
        return stage.need(asked, smallest)
    if smallest is None:
        return stage.need(stage.fewest_for_state(), None)
    need = stage.need(smallest, smallest)
    while offer.count is not None and need.devices + need.ranks <= offer.count:
        doubled = stage.need(2 * need.ranks, smallest)
        if doubled.seconds.total * WORTHWHILE > need.seconds.total:
            break
        need = doubled
    return need


@dataclass(frozen=True, slots=True)
class _Stage:
    work: StageWork
    size: ModelSize
    beside: ModelSize | None
    offer: Offer

    def smallest(self) -> int | None:
        """The fewest ranks, a power of two, on which the fullest rank fits."""
        ranks = 1
        while ranks <= _MOST_RANKS:
            if self.memory(ranks).peak <= self.offer.usable_bytes:
                return ranks
            ranks *= 2
        return None

    def fewest_for_state(self) -> int:
        """The fewest ranks whose shards fit: what to plan with where the stage does not."""
        ranks = 1
        while ranks < _MOST_RANKS and self.memory(ranks).resident > self.offer.usable_bytes:
            ranks *= 2
        return ranks

    def remedy(self) -> Remedy | None:
        """The first of some changes of `compute` under which the stage fits."""
        for names in _REMEDIES:
            changes: dict[str, Any] = {}
            for name in names:
                changes |= _CHANGES[name]
            compute = self.offer.compute.model_copy(update=changes)
            found = replace(self, offer=replace(self.offer, compute=compute)).smallest()
            if found is not None:
                return Remedy(names, found)
        return None

    def placement(self, ranks: int) -> Placement:
        offer = self.offer
        return Placement(
            ranks=ranks,
            value_bytes=offer.value_bytes,
            checkpointing=offer.compute.activation_checkpointing,
            offload=offer.compute.cpu_offload,
            samples=not isinstance(offer.compute.rollouts, VLLM),
            scores=not isinstance(offer.compute.scoring, VLLM),
            packs_weights=offer.packs_weights,
        )

    def memory(self, ranks: int) -> DeviceMemory:
        return device_memory(
            self.work, self.size, self.beside, self.placement(ranks), self.offer.usable_bytes
        )

    def fleet(self) -> Fleet:
        """Servers that sample and score, each of as few devices as hold its model."""
        offer, compute = self.offer, self.offer.compute
        samples = is_served(compute.rollouts) and self.work.rollouts > 0
        urls = compute.rollouts.urls if isinstance(compute.rollouts, VLLM) else ()
        reader = self.beside or self.size
        scores = is_served(compute.scoring) and self.work.scored
        row = self.work.max_new_tokens * self.size.kv_values_per_token * offer.value_bytes
        devices = self.devices_of_a_server(self.size)
        room = devices * offer.usable_bytes - self.size.parameters * offer.value_bytes
        return Fleet(
            per_node=offer.per_node,
            verifier_workers=offer.verifier_workers,
            servers=max(1, len(urls)) if samples else 0,
            server_devices=devices if samples else 1,
            server_rows=max(1, min(MOST_ROWS, int(room // max(row, 1)))),
            scorers=self.devices_of_a_server(reader) if scores else 0,
        )

    def devices_of_a_server(self, size: ModelSize) -> int:
        """Devices, a power of two, that hold the weights with as much room for the cache, or for
        one prompt's rows at full length."""
        row = self.work.max_new_tokens * size.kv_values_per_token
        cache = max(size.parameters, self.work.rows_per_prompt * row)
        held = (size.parameters + cache) * self.offer.value_bytes
        return 1 << max(0, math.ceil(math.log2(max(1.0, held / self.offer.usable_bytes))))

    def need(self, ranks: int, smallest: int | None) -> DeviceNeed:
        memory, placement, fleet = self.memory(ranks), self.placement(ranks), self.fleet()
        seconds = stage_seconds(
            self.work, self.size, self.beside, placement, memory, fleet, self.offer.rates
        )
        return DeviceNeed(
            smallest=smallest,
            ranks=ranks,
            servers=fleet.servers * fleet.server_devices + fleet.scorers,
            checkpointing=placement.checkpointing,
            offload=placement.offload,
            memory=memory,
            seconds=seconds,
            generated_tokens=self.work.generated_tokens,
            trained_tokens=self.work.trained_tokens,
            groups=self.work.groups_per_update or self.work.prompts_per_batch,
            remedy=self.remedy() if smallest is None else None,
        )
