"""What a run would take, before anything is trained: counts, and the cost they stand for.

Counts are those of `stage_work`; FLOPs, memory and time are `cost`'s and `devices`'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from headwater.config.recipe import Recipe
from headwater.ledger.spending import Spending
from headwater.models.size import ModelSize, model_configs, model_size, together
from headwater.workflow.cost import Machine, stage_cost
from headwater.workflow.critical_path import Duty, Schedule, schedule
from headwater.workflow.devices import DeviceNeed
from headwater.workflow.graph import Graph
from headwater.workflow.plan_words import assumptions, device_warnings
from headwater.workflow.stage_work import work_of
from headwater.workflow.study import Study

#: Pools that share no problem with the pool `labels`.
_POOLS_APART = frozenset({"prompts", "worked", "validation"})


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One distinct stage. flops, seconds and peak memory are 0 where a size is not known."""

    fingerprint: str
    kind: str
    model: str
    pool: str | None
    seed: int
    arms: tuple[str, ...]
    cached: bool
    spending: Spending
    devices: DeviceNeed | None = None  # where the size is known

    @property
    def shared(self) -> bool:
        """Whether more than one arm reads it."""
        return len(self.arms) > 1


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """What an arm's row uses at one seed, shared stages included, evaluation left out."""

    arm: str
    seed: int
    stages: tuple[str, ...]
    spending: Spending


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is still to do, side by side: `devices` of a kind, `per_node` in a node; on a CPU,
    worker processes. constants: what the seconds rest on, name -> (value, where it comes from)."""

    device: str
    devices: int
    per_node: int
    schedule: Schedule
    about: str
    constants: Mapping[str, tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole estimate. `training` counts every distinct stage once, `to_do` leaves out the
    cached ones and takes evaluation in. disk_bytes: the most that what is to do needs at once."""

    name: str
    stages: tuple[StageEstimate, ...]
    arms: tuple[ArmEstimate, ...]
    training: Spending
    evaluation: Spending
    to_do: Spending
    cluster: Cluster
    device_hours: float = 0.0  # still to do
    disk_bytes: int = 0
    assumptions: str | None = None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        for stage, row in zip(self.stages, plain["stages"], strict=True):
            row["devices"] = None if stage.devices is None else stage.devices.as_dict()
        return plain


def estimate(
    study: Study,
    machine: Machine,
    cached: Collection[str] = (),
    *,
    mean_response: int | None = None,
) -> Plan:
    """The plan of a study on a machine.

    cached: fingerprints that need not run again. mean_response: tokens of a response, each as
    long as it may get by default.
    """
    graph = study.graph
    sizes = model_sizes(study.recipe)
    stages: dict[str, StageEstimate] = {}
    costs: dict[Any, tuple[Spending, DeviceNeed | None]] = {}
    for fingerprint, node in graph.nodes.items():
        # A teacher that samples for others is the stage's own model, not one beside it.
        asked = [sizes[graph.nodes[one].model_name] for one in node.asked if node.model]
        beside = together(asked) if asked else None
        priced = (work_of(study, node, mean_response), sizes.get(node.model_name), beside)
        if priced not in costs:
            costs[priced] = stage_cost(*priced, machine)
        spending, need = costs[priced]
        stages[fingerprint] = StageEstimate(
            fingerprint=fingerprint,
            kind=node.kind,
            model=node.model_name,
            pool=node.pool or node.eval_set,
            seed=node.seed,
            arms=graph.users[fingerprint],
            cached=fingerprint in cached,
            spending=spending,
            devices=need,
        )

    def total(fingerprints: Iterable[str]) -> Spending:
        return _total([stages[f] for f in fingerprints], len(study.pools["labels"]))

    waiting = [f for f in graph.nodes if f not in cached]
    cluster = _cluster({f: stages[f] for f in waiting}, graph, machine)
    plan = Plan(
        name=study.recipe.name,
        stages=tuple(stages.values()),
        arms=tuple(
            ArmEstimate(arm.arm, arm.seed, graph.arm_stages(arm), total(graph.arm_stages(arm)))
            for arm in graph.arms
        ),
        training=total(f for f, node in graph.nodes.items() if not node.is_evaluation),
        evaluation=total(f for f, node in graph.nodes.items() if node.is_evaluation),
        to_do=replace(total(waiting), seconds=cluster.schedule.seconds),
        cluster=cluster,
    )
    needs = [stages[f].devices for f in waiting]
    return replace(
        plan,
        device_hours=sum(need.device_hours for need in needs if need is not None),
        assumptions=assumptions(machine, mean_response) if machine.device == "cuda" else None,
        warnings=(
            *study.warnings,
            *_budget_warnings(study, plan),
            *_size_warnings(sizes),
            *device_warnings([stages[f] for f in waiting], machine),
        ),
    )


def model_sizes(recipe: Recipe) -> dict[str, ModelSize | None]:
    """Size of every model of the recipe by name; None where only loading it would tell."""
    return {
        name: None if config is None else model_size(config)
        for name, config in model_configs(recipe.models).items()
    }


# --- totals --------------------------------------------------------------------------------------


def _total(chosen: Collection[StageEstimate], label_pool_size: int) -> Spending:
    """Sums; peak memory is the largest, labels are distinct problems of the pools read."""
    summed = {
        item.name: sum(getattr(stage.spending, item.name) for stage in chosen)
        for item in fields(Spending)
        if item.name not in ("labels", "peak_memory_bytes")
    }
    return Spending(
        labels=_distinct_labels(chosen, label_pool_size),
        peak_memory_bytes=max((stage.spending.peak_memory_bytes for stage in chosen), default=0),
        **summed,
    )


def _distinct_labels(chosen: Iterable[StageEstimate], label_pool_size: int) -> int:
    """Labels at most: the parts of the split lie inside the pool `labels`, the rest is apart."""
    read: dict[tuple[bool, str], int] = {}
    for stage in chosen:
        apart = stage.kind == "evaluate" or stage.pool in _POOLS_APART
        key = (apart, stage.pool or "")
        read[key] = max(read.get(key, 0), stage.spending.labels)
    inside = sum(labels for (apart, _), labels in read.items() if not apart)
    return min(inside, label_pool_size) + sum(n for (apart, _), n in read.items() if apart)


def _cluster(waiting: Mapping[str, StageEstimate], graph: Graph, machine: Machine) -> Cluster:
    """The stages to do side by side: on all GPUs, or on a CPU in so many worker processes."""
    on_gpus = machine.device == "cuda"
    duties = {
        fingerprint: Duty(
            seconds=stage.spending.seconds,
            devices=stage.devices.devices if on_gpus and stage.devices else 1,
            parents=graph.nodes[fingerprint].parents,
        )
        for fingerprint, stage in waiting.items()
    }
    largest = max((duty.devices for duty in duties.values()), default=1)
    devices = (machine.offer.count or largest) if on_gpus else machine.processes
    rates = machine.offer.rates
    return Cluster(
        device=machine.device,
        devices=devices,
        per_node=machine.offer.per_node,
        schedule=schedule(duties, max(devices, 1)),
        about=rates.about,
        constants=rates.table(),
    )


def _budget_warnings(study: Study, plan: Plan) -> Iterable[str]:
    for name, limit in study.recipe.budget.limits().items():
        needed = cast(float, getattr(plan.training, name))
        if needed > limit:
            yield (
                f"budget.{name}={limit:.0f} may stop the run: its stages take up to {needed:.0f}; "
                "raise it, or shorten the stages"
            )


def _size_warnings(sizes: Mapping[str, ModelSize | None]) -> Iterable[str]:
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        yield (
            f"size of {', '.join(unknown)} not known before it is loaded: FLOPs, memory and time "
            "of its stages count as 0; give a local folder to have them"
        )
