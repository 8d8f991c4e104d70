"""What a plan for devices says in words: what it rests on, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from headwater.workflow.cost import Machine
from headwater.workflow.devices import USABLE_SHARE, DeviceNeed

if TYPE_CHECKING:
    from headwater.workflow.estimate import StageEstimate

_GIB = 2**30


def assumptions(machine: Machine, mean_response: int | None) -> str:
    """What ranks, memory and hours rest on."""
    offer = machine.offer
    rates = offer.rates
    length = (
        "every response as long as it may get (an upper bound; --mean-response TOKENS)"
        if mean_response is None
        else f"responses of {mean_response} tokens on average, falling off exponentially up to the "
        "limit, and room for the longest"
    )
    measured = len(rates.measured())
    return (
        f"A model, not a measurement: {rates.about}; {measured} of {len(rates.table())} constants "
        f"are measured (--calibration FILE), the others from data sheets or assumed (--json lists "
        f"each). Training at {rates.training_flops / 1e12:.3g} TFLOP/s a device, decoding that "
        f"reads weights and cache at {rates.memory_bandwidth / 1e12:.3g} TB/s, {length}. Weights, "
        "moments and gradients are sharded over a stage's ranks by FSDP2; while it samples every "
        "rank holds the weights whole and draws its share of the prompts. "
        f"{USABLE_SHARE:.0%} of {offer.memory_bytes / _GIB:g} GiB a device is filled; prompts, and "
        "a cluster's queue, are left out. Run it on several ranks with --nproc N or over a cluster "
        "with --ray; several ranks have been tested on CPUs, and not yet been run on GPUs."
    )


def device_warnings(stages: Sequence[StageEstimate], machine: Machine) -> Iterable[str]:
    """Stages that fit on no number of ranks, on fewer than they are given, or not at once."""
    offer = machine.offer
    if machine.device != "cuda":
        return
    needs = [(stage, stage.devices) for stage in stages if stage.devices is not None]
    never = [(stage, need) for stage, need in needs if need.smallest is None]
    if never:
        stage, need = max(never, key=lambda pair: pair[1].bytes_per_device)
        held = f"{need.bytes_per_device / _GIB:.0f} GiB in {stage.kind} of {stage.model}"
        yield (
            f"{len(never)} stages ({_names(s for s, _ in never)}) fit on no number of "
            f"{offer.memory_bytes / _GIB:g}-GiB devices: {_cause(need)}, up to "
            f"{held}; {_cure(need)}"
        )
    short = [(s, n) for s, n in needs if n.smallest is not None and n.smallest > n.ranks]
    if short:
        most = max(need.smallest or 0 for _, need in short)
        yield (
            f"compute.ranks={offer.compute.ranks} is too few for {len(short)} stages "
            f"({_names(s for s, _ in short)}), which need up to {most}; raise it (--nproc {most}), "
            "or set compute.cpu_offload=true"
        )
    larger = [need.devices for _, need in needs if need.devices > (offer.count or need.devices)]
    if larger:
        yield (
            f"--gpus {offer.count} is too few for {len(larger)} of the stages, which need up to "
            f"{max(larger)}: they are planned with the fewest that each fits on"
        )


def _names(stages: Iterable[StageEstimate]) -> str:
    found = list(dict.fromkeys(f"{stage.kind} of {stage.model}" for stage in stages))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more kinds" if len(found) > 3 else "")


def _cause(need: DeviceNeed) -> str:
    memory = need.memory
    if memory.sampling > memory.training:
        return "every rank that samples holds the weights whole"
    return "what a rank keeps of one group of rollouts is too large"


def _cure(need: DeviceNeed) -> str:
    if need.memory.sampling > need.memory.training:
        return (
            "let vLLM servers over several GPUs sample (compute.rollouts: vllm), or take larger "
            "devices (--gpu-memory)"
        )
    if not need.checkpointing:
        return "set compute.activation_checkpointing=true, or shorter responses or smaller groups"
    return "set shorter responses (sampling.max_new_tokens) or smaller groups"
