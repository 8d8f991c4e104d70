"""FLOPs, memory and time that a stage's counts stand for, on a CPU or on GPUs.

Prompts are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from headwater.ledger.spending import Spending
from headwater.models.size import ModelSize
from headwater.workflow.calibration import Calibration
from headwater.workflow.devices import DeviceNeed, Offer, device_need
from headwater.workflow.stage_work import StageWork

#: What a process holds before any model: Python, torch, transformers.
PROCESS_BYTES = 400 * 2**20
_NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it would run: "cpu" or "cuda", worker processes, threads of each, and devices (on a
    CPU: processes, whose memory has no limit; `offer.rates` are one thread's)."""

    device: str
    processes: int
    threads: int
    offer: Offer = field(default_factory=Offer)

    def offered(self, size: ModelSize) -> Offer:
        """The devices as a model of this size sees them."""
        if self.device == "cuda":
            return self.offer
        narrow = size.hidden >= 256 and self.offer.value_bytes == 2
        return replace(
            self.offer,
            memory_bytes=_NO_LIMIT,
            count=None,
            rates=with_threads(self.offer.rates, self.threads),
            packs_weights=True,
            value_bytes=2 if narrow else 4,
        )


def with_threads(rates: Calibration, threads: int) -> Calibration:
    """A process of several threads: products go so many times faster, memory does not."""
    return replace(
        rates,
        training_flops=rates.training_flops * threads,
        scoring_flops=rates.scoring_flops * threads,
        decoding_flops=rates.decoding_flops * threads,
        small_flops=rates.small_flops * threads,
        small_decoding_flops=rates.small_decoding_flops * threads,
    )


def stage_cost(
    work: StageWork,
    size: ModelSize | None,
    teacher: ModelSize | None,
    machine: Machine,
) -> tuple[Spending, DeviceNeed | None]:
    """Counts with their cost, and what that is of devices; neither cost where a size is unknown.

    size: of the model that samples or is trained; teacher: of another that reads what it samples.
    """
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
        return counts, None
    beside = teacher or (size if work.referenced else None)
    need = device_need(work, size, beside, machine.offered(size))
    process = PROCESS_BYTES if machine.device == "cpu" else 0
    cost = replace(
        counts,
        flops=_flops(work, counts, size, teacher or size),
        seconds=need.seconds.total,
        peak_memory_bytes=need.bytes_per_device + process,
    )
    return cost, need


def _flops(work: StageWork, counts: Spending, size: ModelSize, teacher: ModelSize) -> float:
    """2 FLOPs a parameter and token forward, 4 backward."""
    own = 2.0 * counts.generated_tokens + 6.0 * counts.trained_tokens
    if work.referenced:
        own += 2.0 * counts.trained_tokens
    scoring = 2.0 * counts.teacher_scored_tokens * teacher.matmul_parameters
    return own * size.matmul_parameters + scoring
