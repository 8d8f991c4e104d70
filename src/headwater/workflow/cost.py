"""FLOPs, memory and time that a stage's counts stand for, on a CPU or on GPUs.

Orders of magnitude, from the constants here and in `gpus`; prompts are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from headwater.ledger.spending import Spending
from headwater.models.size import ModelSize
from headwater.workflow.gpus import GpuNeed, GpuOffer, gpu_need
from headwater.workflow.stage_work import StageWork

#: Bytes a trained parameter takes: float32 master, two Adam moments, gradient; compute copy.
_TRAINED_PARAMETER_BYTES = 4 + 8 + 4 + 2
#: Activations kept for the backward pass, in values of the hidden width per token and layer.
_ACTIVATION_WIDTHS = 18
_VALUE_BYTES = 4
#: What a process holds before any model: Python, torch, transformers.
_PROCESS_BYTES = 400 * 2**20
#: Rows of a batch that decode together.
_DECODING_ROWS = 256
#: What a layer costs a CPU however small it is.
_SECONDS_PER_LAYER = 4e-4


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it would run: "cpu" or "cuda", worker processes, threads of each, and GPUs."""

    device: str
    processes: int
    threads: int
    offer: GpuOffer = field(default_factory=GpuOffer)


def stage_cost(
    work: StageWork,
    size: ModelSize | None,
    teacher: ModelSize | None,
    machine: Machine,
    value_bytes: int = 2,
) -> tuple[Spending, GpuNeed | None]:
    """Counts with their cost, and what that is of GPUs; neither cost where a size is unknown.

    size: of the model that samples or is trained; teacher: of another that reads what it samples.
    value_bytes: of a weight on a GPU.
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
    flops = _flops(work, counts, size, teacher or size)
    if machine.device == "cuda":
        beside = teacher or (size if work.referenced else None)
        need = gpu_need(work, size, beside, machine.offer, value_bytes)
        return (
            replace(
                counts, flops=flops, seconds=need.seconds, peak_memory_bytes=need.bytes_per_gpu
            ),
            need,
        )
    seconds = _seconds(work, flops, size, machine.threads)
    memory = _memory(work, size, teacher or size)
    return replace(counts, flops=flops, seconds=seconds, peak_memory_bytes=memory), None


def _flops(work: StageWork, counts: Spending, size: ModelSize, teacher: ModelSize) -> float:
    """2 FLOPs a parameter and token forward, 4 backward."""
    own = 2.0 * counts.generated_tokens + 6.0 * counts.trained_tokens
    if work.referenced:
        own += 2.0 * counts.trained_tokens
    scoring = 2.0 * counts.teacher_scored_tokens * teacher.matmul_parameters
    return own * size.matmul_parameters + scoring


def _seconds(work: StageWork, flops: float, size: ModelSize, threads: int) -> float:
    """On cores at what large products reach, which is more in bf16, beyond tiny models."""
    rate = threads * (1.5e11 if size.parameters > 20_000_000 else 3e10)
    rows = work.rollouts / max(work.rollout_batches, 1)
    decode_steps = work.rollout_batches * math.ceil(rows / _DECODING_ROWS) * work.mean_new_tokens
    micro_batches = max(work.updates, work.trained_tokens // max(work.micro_batch_tokens, 1))
    fixed = (decode_steps + 4 * micro_batches) * size.layers * _SECONDS_PER_LAYER
    return fixed + flops / rate


def _memory(work: StageWork, size: ModelSize, teacher: ModelSize) -> int:
    """The larger of what training and what sampling holds, in bytes."""
    activations = work.micro_batch_tokens * size.layers * size.hidden * _ACTIVATION_WIDTHS
    training = size.parameters * _TRAINED_PARAMETER_BYTES + activations * _VALUE_BYTES
    rows = min(_DECODING_ROWS, work.rows_per_batch)
    cache = rows * work.max_new_tokens * size.kv_values_per_token
    sampling = (size.parameters + cache) * _VALUE_BYTES
    beside = teacher.parameters * _VALUE_BYTES if work.scored else 0
    return _PROCESS_BYTES + beside + max(training if work.updates else 0, sampling)
