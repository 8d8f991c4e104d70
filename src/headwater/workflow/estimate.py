"""What a run would take, before anything is trained: counts, and the cost they stand for.

Counts are those of `stage_work`. FLOPs, memory and time are orders of magnitude, from the
constants below; they leave out prompts and the attention's quadratic part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from headwater.config.recipe import Recipe
from headwater.ledger.spending import Spending
from headwater.models.size import ModelSize, model_configs, model_size
from headwater.workflow.graph import Graph
from headwater.workflow.stage_work import StageWork, work_of
from headwater.workflow.study import Study

#: Bytes a trained parameter takes: float32 master, two Adam moments, gradient; compute copy.
_TRAINED_PARAMETER_BYTES = 4 + 8 + 4 + 2
#: Activations kept for the backward pass, in values of the hidden width per token and layer.
_ACTIVATION_WIDTHS = 18
_VALUE_BYTES = 4
#: What a process holds before any model: Python, torch, transformers.
_PROCESS_BYTES = 400 * 2**20
#: Pools that share no problem with the pool `labels`.
_POOLS_APART = frozenset({"prompts", "worked", "validation"})
#: Rows of a batch that decode together.
_DECODING_ROWS = 256


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine is: FLOP/s in large products, and what a layer costs however small."""

    flops_per_second: float
    seconds_per_layer: float


def rates(device: str, threads: int, parameters: int) -> Rates:
    """Rates of one process: cpu cores at what large products reach, bf16 beyond tiny models."""
    if device == "cuda":
        return Rates(flops_per_second=1.5e14, seconds_per_layer=5e-5)
    return Rates(
        flops_per_second=threads * (1.5e11 if parameters > 20_000_000 else 3e10),
        seconds_per_layer=4e-4,
    )


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
class Plan:
    """The whole estimate. `training` counts every distinct stage once, `to_do` leaves out the
    cached ones and takes evaluation in."""

    name: str
    stages: tuple[StageEstimate, ...]
    arms: tuple[ArmEstimate, ...]
    training: Spending
    evaluation: Spending
    to_do: Spending
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it would run: "cpu" or "cuda", worker processes, and threads of each."""

    device: str
    processes: int
    threads: int


def estimate(study: Study, machine: Machine, cached: Collection[str] = ()) -> Plan:
    """The plan of a study on a machine; `cached` are fingerprints that need not run again."""
    graph = study.graph
    sizes = model_sizes(study.recipe)
    stages = {
        fingerprint: StageEstimate(
            fingerprint=fingerprint,
            kind=node.kind,
            model=node.model_name,
            pool=node.pool or node.eval_set,
            seed=node.seed,
            arms=graph.users[fingerprint],
            cached=fingerprint in cached,
            spending=_spending(
                work_of(study, node),
                sizes[node.model_name],
                sizes[graph.nodes[node.teacher].model_name] if node.teacher else None,
                machine,
            ),
        )
        for fingerprint, node in graph.nodes.items()
    }

    def total(fingerprints: Iterable[str]) -> Spending:
        return _total([stages[f] for f in fingerprints], len(study.pools["labels"]))

    waiting = [f for f in graph.nodes if f not in cached]
    plan = Plan(
        name=study.recipe.name,
        stages=tuple(stages.values()),
        arms=tuple(
            ArmEstimate(arm.arm, arm.seed, graph.arm_stages(arm), total(graph.arm_stages(arm)))
            for arm in graph.arms
        ),
        training=total(f for f, node in graph.nodes.items() if not node.is_evaluation),
        evaluation=total(f for f, node in graph.nodes.items() if node.is_evaluation),
        to_do=replace(
            total(waiting), seconds=_wall_seconds(waiting, stages, graph, machine.processes)
        ),
    )
    warnings = (*study.warnings, *_budget_warnings(study, plan), *_size_warnings(sizes))
    return replace(plan, warnings=warnings)


def model_sizes(recipe: Recipe) -> dict[str, ModelSize | None]:
    """Size of every model of the recipe by name; None where only loading it would tell."""
    return {
        name: None if config is None else model_size(config)
        for name, config in model_configs(recipe.models).items()
    }


# --- what that costs -----------------------------------------------------------------------------


def _spending(
    work: StageWork, size: ModelSize | None, teacher: ModelSize | None, machine: Machine
) -> Spending:
    """Counts and, where the model's size is known, cost. A teacher that samples is `size`."""
    counts = Spending(
        labels=work.labels,
        verifier_calls=work.verifier_calls,
        prompts=work.prompts,
        generated_tokens=work.generated_tokens,
        teacher_scored_tokens=work.generated_tokens if work.scored else 0,
        trained_tokens=work.trained_tokens,
        updates=work.updates,
    )
    if size is None or work == StageWork():
        return counts
    teacher = teacher or size
    return replace(
        counts,
        flops=_flops(counts, size, teacher),
        seconds=_seconds(work, counts, size, teacher, machine),
        peak_memory_bytes=_memory(work, size, teacher),
    )


def _flops(counts: Spending, size: ModelSize, teacher: ModelSize) -> float:
    """2 FLOPs a parameter and token forward, 4 backward."""
    own = 2.0 * counts.generated_tokens + 6.0 * counts.trained_tokens
    scoring = 2.0 * counts.teacher_scored_tokens * teacher.matmul_parameters
    return own * size.matmul_parameters + scoring


def _seconds(
    work: StageWork, counts: Spending, size: ModelSize, teacher: ModelSize, machine: Machine
) -> float:
    speed = rates(machine.device, machine.threads, size.parameters)
    rows = work.rollouts / max(work.rollout_batches, 1)
    decode_steps = work.rollout_batches * math.ceil(rows / _DECODING_ROWS) * work.max_new_tokens
    micro_batches = max(work.updates, counts.trained_tokens // max(work.micro_batch_tokens, 1))
    fixed = (decode_steps + 4 * micro_batches) * size.layers * speed.seconds_per_layer
    return fixed + _flops(counts, size, teacher) / speed.flops_per_second


def _memory(work: StageWork, size: ModelSize, teacher: ModelSize) -> int:
    """The larger of what training and what sampling holds, in bytes."""
    activations = work.micro_batch_tokens * size.layers * size.hidden * _ACTIVATION_WIDTHS
    training = size.parameters * _TRAINED_PARAMETER_BYTES + activations * _VALUE_BYTES
    rows = min(_DECODING_ROWS, work.rollouts // max(work.rollout_batches, 1))
    cache = rows * work.max_new_tokens * size.kv_values_per_token
    sampling = (size.parameters + cache) * _VALUE_BYTES
    beside = teacher.parameters * _VALUE_BYTES if work.scored else 0
    return _PROCESS_BYTES + beside + max(training if work.updates else 0, sampling)


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


def _wall_seconds(
    waiting: Iterable[str], stages: Mapping[str, StageEstimate], graph: Graph, processes: int
) -> float:
    """Time with `processes` stages at once: no less than the longest chain of parents."""
    ends: dict[str, float] = {}
    work = 0.0
    for fingerprint in waiting:
        seconds = stages[fingerprint].spending.seconds
        begins = max((ends.get(p, 0.0) for p in graph.nodes[fingerprint].parents), default=0.0)
        ends[fingerprint] = begins + seconds
        work += seconds
    return max(work / processes, max(ends.values(), default=0.0))


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
