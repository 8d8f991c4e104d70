"""What a stage needs of GPUs: bytes by what they hold, how many GPUs, and how long on them.

Everything that a stage holds is taken to be spread evenly over its GPUs: weights, optimiser
state, activations and KV cache alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from headwater.models.size import ModelSize
from headwater.workflow.stage_work import StageWork

#: bf16 products of one H100 or H200, FLOP/s, without sparsity (NVIDIA's data sheet).
PEAK_FLOPS = 989e12
#: Share of the peak that training and scoring of long sequences usually reach.
MODEL_FLOPS_SHARE = 0.40
#: Memory bandwidth of one H100 SXM, bytes/s: a decoding step reads the weights and the cache.
MEMORY_BANDWIDTH = 3.35e12
#: What launching the kernels of a layer takes in a decoding step, however small the model.
SECONDS_PER_LAYER = 5e-5
#: Share of a GPU's memory that a plan fills; the rest is for logits, buffers and fragments.
USABLE_SHARE = 0.90
#: float32 master, two Adam moments and a gradient, in bytes a parameter.
OPTIMISER_BYTES = 4 + 8 + 4
#: Activations kept for the backward pass, in values of the hidden width per token and layer.
ACTIVATION_WIDTHS = 18
#: Rows that the sampler decodes at once at most (`InProcessSampler`).
MOST_ROWS = 512
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuOffer:
    """Memory of one GPU, and how many a stage gets; None for as few as it fits on."""

    memory_bytes: int = 80 * _GIB
    count: int | None = None


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """A stage on GPUs. The parts are bytes over all of its GPUs together.

    weights: in the compute format; optimiser: masters, moments, gradients; activations: of one
    micro-batch; kv_cache: of the `decoding_rows` that are sampled together, at full length;
    beside: a teacher or reference in the compute format. Activations and cache are not held at
    the same time. smallest: the fewest GPUs it fits on, a power of two; gpus: those planned with.
    """

    weights_bytes: int
    optimiser_bytes: int
    activations_bytes: int
    kv_cache_bytes: int
    beside_bytes: int
    decoding_rows: int
    smallest: int
    gpus: int
    seconds: float

    @property
    def bytes_per_gpu(self) -> int:
        """What one of its GPUs holds at most."""
        held = self.weights_bytes + self.optimiser_bytes + self.beside_bytes
        return math.ceil((held + max(self.activations_bytes, self.kv_cache_bytes)) / self.gpus)

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.seconds / 3600 * self.gpus

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"bytes_per_gpu": self.bytes_per_gpu, "gpu_hours": self.gpu_hours}


def gpu_need(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    offer: GpuOffer,
    value_bytes: int = 2,
) -> GpuNeed:
    """What `work` on a model of `size` needs.

    beside: the size of a teacher or reference that is held as well and reads what is trained
    on. value_bytes: of a weight as it is computed with, 2 for bf16.
    """
    trains = work.updates > 0
    weights = size.parameters * value_bytes
    # In float32 the masters are the weights.
    per_parameter = OPTIMISER_BYTES if value_bytes < 4 else OPTIMISER_BYTES - 4
    optimiser = size.parameters * per_parameter if trains else 0
    beside_bytes = beside.parameters * value_bytes if beside else 0
    activations = (
        work.micro_batch_tokens * size.layers * size.hidden * ACTIVATION_WIDTHS * value_bytes
        if trains
        else 0
    )
    row = max(work.max_new_tokens * size.kv_values_per_token * value_bytes, 1)
    held = weights + optimiser + beside_bytes
    usable = offer.memory_bytes * USABLE_SHARE
    wanted = min(MOST_ROWS, work.rows_per_batch)
    group = min(work.rows_per_prompt, wanted)  # rollouts of a prompt decode together
    smallest = _power_of_two((held + max(activations, group * row)) / usable)
    gpus = max(smallest, offer.count or 0)
    rows = min(wanted, int((gpus * usable - held) // row))
    return GpuNeed(
        weights_bytes=weights,
        optimiser_bytes=optimiser,
        activations_bytes=activations,
        kv_cache_bytes=rows * row if wanted else 0,
        beside_bytes=beside_bytes,
        decoding_rows=rows,
        smallest=smallest,
        gpus=gpus,
        seconds=(
            _decoding_seconds(work, size, rows, gpus, value_bytes)
            + _computing_seconds(work, size, beside, gpus)
        ),
    )


def assumptions(offer: GpuOffer, mean_response: int | None) -> str:
    """What the numbers of GPUs and hours rest on, in two sentences."""
    length = (
        "every response as long as it may get (an upper bound; --mean-response TOKENS)"
        if mean_response is None
        else f"responses of {mean_response} tokens on average, room for the longest"
    )
    return (
        f"GPU hours assume training and scoring at {MODEL_FLOPS_SHARE:.0%} of "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s (bf16, H100 or H200), decoding that reads weights and "
        f"cache at {MEMORY_BANDWIDTH / 1e12:.2f} TB/s with as many rows as fit, {length}, all "
        f"that a stage holds spread evenly over its GPUs ({USABLE_SHARE:.0%} of "
        f"{offer.memory_bytes / _GIB:g} GiB each), no recomputed activations, a group of rollouts "
        "in one micro-batch, and stages one after another. This version trains on one device: "
        "stages that need several GPUs are planned, not yet runnable."
    )


def _power_of_two(least: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(least, 1.0))))


def _decoding_seconds(
    work: StageWork, size: ModelSize, rows: int, gpus: int, value_bytes: int
) -> float:
    """A step takes the longest of reading weights and cache, multiplying, and launching."""
    if not work.rollouts:
        return 0.0
    steps = (
        work.rollout_batches * math.ceil(work.rows_per_batch / max(rows, 1)) * work.mean_new_tokens
    )
    cache = rows * work.mean_new_tokens / 2 * size.kv_values_per_token  # half full on average
    reading = (size.matmul_parameters + cache) * value_bytes / (gpus * MEMORY_BANDWIDTH)
    multiplying = 2.0 * size.matmul_parameters * rows / (gpus * PEAK_FLOPS * MODEL_FLOPS_SHARE)
    return steps * max(reading, multiplying, size.layers * SECONDS_PER_LAYER)


def _computing_seconds(
    work: StageWork, size: ModelSize, beside: ModelSize | None, gpus: int
) -> float:
    """Training, three forwards a token; and the forward of whoever reads it besides."""
    length = work.mean_new_tokens
    flops = 3 * work.trained_tokens * _forward_flops(size, length)
    if work.scored:
        flops += work.generated_tokens * _forward_flops(beside or size, length)
    if work.referenced:
        flops += work.trained_tokens * _forward_flops(size, length)
    return flops / (gpus * PEAK_FLOPS * MODEL_FLOPS_SHARE)


def _forward_flops(size: ModelSize, length: int) -> float:
    """Per token: two a parameter, and attention to half of the sequence on average."""
    return 2.0 * size.matmul_parameters + 2.0 * size.layers * size.attention_width * length
