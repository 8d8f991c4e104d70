"""What a plan for devices says in words: what it rests on, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from headwater.workflow.cost import Machine
from headwater.workflow.devices import RECOMPUTE, SERVERS, USABLE_SHARE, DeviceNeed, Remedy

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
    for remedy, found in _by_remedy(needs).items():
        need = max((need for _, need in found), key=lambda need: need.bytes_per_device)
        yield (
            f"{_names(s for s, _ in found)}: fit on no number of {offer.memory_bytes / _GIB:g}-GiB "
            f"devices ({need.bytes_per_device / _GIB:.0f} GiB on {need.ranks}), for "
            f"{_cause(remedy)}; {_cure(remedy, found)}"
        )
    spare = [(s, n) for s, n in needs if n.ranks > n.groups > 0 and n.smallest == n.ranks > 1]
    if spare:
        _, need = max(spare, key=lambda pair: pair[1].ranks / pair[1].groups)
        keeps = not offer.compute.activation_checkpointing
        cheaper = ", or set compute.activation_checkpointing=true to need fewer" if keeps else ""
        yield (
            f"{_names(s for s, _ in spare)}: fit on no fewer ranks than they are given and have "
            f"fewer groups a step, as {need.groups} for {need.ranks} ranks, some of which wait; "
            f"raise prompts_per_step{cheaper}"
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


def _by_remedy(
    needs: Iterable[tuple[StageEstimate, DeviceNeed]],
) -> dict[Remedy | None, list[tuple[StageEstimate, DeviceNeed]]]:
    found: dict[Remedy | None, list[tuple[StageEstimate, DeviceNeed]]] = {}
    for stage, need in needs:
        if need.smallest is None:
            settings = Remedy(need.remedy.settings, 0) if need.remedy else None
            found.setdefault(settings, []).append((stage, need))
    return found


def _cause(remedy: Remedy | None) -> str:
    settings = remedy.settings if remedy else ()
    causes = []
    if SERVERS in settings:
        causes.append("every rank that samples holds the weights whole")
    if RECOMPUTE in settings:
        causes.append("the backward pass keeps all layers of a response")
    return " and ".join(causes) or "what a rank needs to compute at all"


def _cure(remedy: Remedy | None, found: Sequence[tuple[StageEstimate, DeviceNeed]]) -> str:
    if remedy is None:
        return "take larger devices (--gpu-memory), or shorter responses (sampling.max_new_tokens)"
    ranks = max(need.remedy.ranks for _, need in found if need.remedy is not None)
    return f"set {', '.join(remedy.settings)}: then they fit on up to {ranks} ranks"
