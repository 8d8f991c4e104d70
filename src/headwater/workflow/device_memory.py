"""What one device holds of a stage, part by part, in bytes, for a number of ranks.

Formulas of what the engine keeps: FSDP2 (`fully_shard`, each layer a unit, embedding and head in
the root unit) with float32 weights as they are sharded and another format to compute in; the
layers with a backward pass by hand, which keep their inputs, queries, keys, values, what attention
read, the middle, gate and up; the head in chunks. Prompts are left out, as everywhere in a plan.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from headwater.models.size import ModelSize
from headwater.workflow.adapter_memory import adapter_size
from headwater.workflow.stage_work import StageWork

MASTER_BYTES = 4
MOMENT_BYTES = 8
GRADIENT_BYTES = 4
_WIDE_BYTES = 4
#: Layers that are gathered at once: the one that computes and the one prefetched behind it.
GATHERED_LAYERS = 2
#: Rows that the sampler decodes at once at most (`rollout.sampler.MAX_ROWS`).
MOST_ROWS = 512
#: Hidden size from which a forward pass is recorded (`engine.decoder`).
SMALLEST_RECORDED = 256
#: Room the cache has beyond what is written, on average: it grows by an eighth of itself.
_CACHE_SLACK = 17 / 16
#: Of one drawn token: its id, its log-probability and its uniform.
_DRAWN_BYTES = 8 + 4 + 4
#: `losses.chunked_head`: elements of a chunk, the fewest tokens of one, elements held back.
_CHUNK_ELEMENTS, _FEWEST_TOKENS, _HELD_ELEMENTS = 1 << 23, 64, 1 << 26


@dataclass(frozen=True, slots=True)
class Placement:
    """How a stage is spread and what it computes in.

    value_bytes: of a weight or activation as it is computed with. checkpointing: the backward pass
    computes layers again. offload: sharded weights, moments and gradients lie in the host's
    memory. samples, scores: whether the ranks themselves sample, and hold a teacher; vLLM servers
    may do either. packs_weights: decoding on a CPU keeps a second copy of what it multiplies with.
    """

    ranks: int = 1
    value_bytes: int = 2
    checkpointing: bool = False
    offload: bool = False
    samples: bool = True
    scores: bool = True
    packs_weights: bool = False


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device. `masters`, `moments`, `gradients` and `beside` are held all along; the
    parts of sampling and of training are not held at the same time.

    masters: float32 weights, this rank's shard; with adapters these, and the weights that they are
    relative to. moments: Adam's two. gradients: this rank's shard,
    or all of them. beside: a teacher's or reference's shard. host: what lies in the host's memory
    instead. Sampling: weights gathered whole (and packed copies), the cache of `rows` rows at full
    length, the logits and drawn tokens, and on a CPU the forward pass that is recorded for training
    (`engine.recording`). Training: gathered layers, unreduced gradients, what is
    kept for the backward pass of `micro_batch_tokens`, a layer's work space, chunks of logits.
    """

    masters: int
    moments: int
    gradients: int
    beside: int
    host: int
    rows: int
    micro_batch_tokens: int
    sampling_weights: int
    packed_weights: int
    kv_cache: int
    drawing: int
    recorded: int
    training_weights: int
    unreduced_gradients: int
    activations: int
    head: int

    @property
    def resident(self) -> int:
        """What is held all along."""
        return self.masters + self.moments + self.gradients + self.beside

    @property
    def sampling(self) -> int:
        """What sampling holds besides."""
        weights = self.sampling_weights + self.packed_weights
        return weights + self.kv_cache + self.drawing + self.recorded

    @property
    def training(self) -> int:
        """What training or scoring holds besides."""
        return self.training_weights + self.unreduced_gradients + self.activations + self.head

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.resident + max(self.sampling, self.training)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "resident": self.resident,
            "sampling": self.sampling,
            "training": self.training,
            "peak": self.peak,
        }


def device_memory(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    limit_bytes: float = math.inf,
) -> DeviceMemory:
    """What one rank holds at most: the one with most groups.

    beside: size of the teacher or reference that the ranks hold too. limit_bytes: of a device; as
    many rows decode at once as leave it room, and no fewer than one prompt's.
    """
    ranks, trains = placement.ranks, work.updates > 0
    beside = beside if placement.scores else None
    samples = placement.samples and work.rollouts > 0
    computes = trains or samples or work.scored  # servers may do all that a stage wants
    state = 0, 0, 0
    if trains:
        state = _state(work, size, placement)
    elif ranks > 1 and computes:
        state = shard(size.parameters * placement.value_bytes, ranks), 0, 0
    on_device = (0, 0, 0) if placement.offload and trains else state
    beside_bytes = shard(beside.parameters * placement.value_bytes, ranks) if beside else 0
    memory = DeviceMemory(
        *on_device,
        beside=beside_bytes,
        host=sum(state) - sum(on_device),
        rows=0,
        micro_batch_tokens=0,
        sampling_weights=_whole(work, size, placement) if samples else 0,
        packed_weights=_packed(size, placement) if samples else 0,
        kv_cache=0,
        drawing=0,
        recorded=_recorded(work, size, placement) if samples else 0,
        training_weights=(_weights_in_layers(work, size, beside, placement) if computes else 0),
        unreduced_gradients=_unreduced(size, placement) if trains and ranks > 1 else 0,
        activations=0,
        head=0,
    )
    if trains or work.scored:
        memory = _with_tokens(memory, work, size, beside, placement, limit_bytes)
    if samples:
        memory = _with_rows(memory, work, size, placement, limit_bytes)
    return memory


def shard(amount: int, ranks: int) -> int:
    """This rank's part; FSDP2 pads the first dimension of each weight to a multiple of ranks."""
    return math.ceil(amount / ranks)


def groups_of_rank(groups: int, ranks: int) -> int:
    """Groups of the rank that has most: groups are dealt out one by one and never divided."""
    return math.ceil(groups / ranks)


def gathered_bytes(size: ModelSize, value_bytes: int) -> int:
    """Root unit and `GATHERED_LAYERS` layers, whole."""
    layers = min(GATHERED_LAYERS, size.layers) * size.layer_parameters
    return (size.root_parameters + layers) * value_bytes


def activation_values(size: ModelSize) -> int:
    """Values a layer keeps of one token for its backward pass (`engine.fused_layers`)."""
    kv = size.kv_values_per_token // size.layers
    kept = 2 * size.hidden + 2 * size.attention_width + kv + 2 * size.intermediate
    return kept + (size.attention_width + kv // 2 if size.head_norms else 0)


def _state(work: StageWork, size: ModelSize, placement: Placement) -> tuple[int, int, int]:
    """Masters, moments and gradients of a stage that trains.

    Adapters are whole on every rank, beside what they are relative to: a rank's shard in float32,
    or all of it as it came. Alone, a layer's gradients are projected before the next one's come.
    """
    ranks = placement.ranks
    if work.lora is None:
        weights = shard(size.parameters * MASTER_BYTES, ranks)
        moments = shard(size.parameters * MOMENT_BYTES, ranks)
        return weights, moments, _gradients(work, size, placement)
    own = adapter_size(size, work.lora)
    if ranks == 1:
        masters = own.base_bytes(work.lora, placement.value_bytes)
        gradients = size.layer_parameters * placement.value_bytes
    else:
        masters = shard((size.parameters + own.adapted) * MASTER_BYTES, ranks)
        gradients = shard(own.adapted * GRADIENT_BYTES, ranks)
    return (
        masters + own.parameters * MASTER_BYTES,
        own.parameters * MOMENT_BYTES,
        gradients + own.parameters * GRADIENT_BYTES,
    )


def _whole(work: StageWork, size: ModelSize, placement: Placement) -> int:
    """Weights as they compute; on a rank alone float32 masters compute themselves."""
    in_full = work.updates > 0 and work.lora is None
    masters_compute = placement.ranks == 1 and in_full and placement.value_bytes == MASTER_BYTES
    return 0 if masters_compute else size.parameters * placement.value_bytes


def _weights_in_layers(
    work: StageWork, size: ModelSize, beside: ModelSize | None, placement: Placement
) -> int:
    """What is gathered while layers compute: a rank alone has its weights whole."""
    if placement.ranks == 1:
        return _whole(work, size, placement)
    readers = [one for one in (size, beside) if one is not None]
    return max(gathered_bytes(one, placement.value_bytes) for one in readers)


def _gradients(work: StageWork, size: ModelSize, placement: Placement) -> int:
    """Sharded sums in float32; of a rank alone also a micro-batch's own, where it adds several."""
    if placement.ranks > 1:
        return shard(size.parameters * GRADIENT_BYTES, placement.ranks)
    one = size.parameters * placement.value_bytes
    several = (
        micro_batches(work, 1, work.micro_batch_tokens) > 1
        and placement.value_bytes < GRADIENT_BYTES
    )
    return one + size.parameters * GRADIENT_BYTES if several else one


def micro_batches(work: StageWork, ranks: int, tokens_at_once: int) -> int:
    """Micro-batches of an update on the rank that has most groups.

    Whole groups as long as one fits into `tokens_at_once`, pieces of groups otherwise.
    """
    if not work.updates:
        return 0
    groups = groups_of_rank(work.groups_per_update, ranks)
    mean = max(1.0, work.trained_tokens / work.updates / max(work.groups_per_update, 1))
    if mean > tokens_at_once:
        return groups * math.ceil(mean / max(tokens_at_once, 1))
    return math.ceil(groups / max(1, int(tokens_at_once // mean)))


def _unreduced(size: ModelSize, placement: Placement) -> int:
    """Whole gradients of the root unit and of one layer, and their float32 copies to reduce."""
    largest = size.root_parameters + size.layer_parameters
    wide = 0 if placement.value_bytes == _WIDE_BYTES else _WIDE_BYTES
    return largest * (placement.value_bytes + wide)


def _activations(size: ModelSize, tokens: int, placement: Placement, *, kept: bool) -> int:
    """Kept for the backward pass, and the work space of the layer that computes."""
    layer = activation_values(size)
    if not kept:
        values = layer
    elif placement.checkpointing:
        values = size.layers * size.hidden + 2 * layer
    else:
        values = size.layers * layer + layer
    return tokens * values * placement.value_bytes


def _head(work: StageWork, size: ModelSize, tokens: int, placement: Placement, *, two: bool) -> int:
    """Chunks of logits (two with a teacher's), gradients held back, the head's own gradient."""
    if not tokens:
        return 0
    chunk = max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // size.vocabulary)
    wide = min(chunk, tokens) * size.vocabulary * _WIDE_BYTES * (2 if two else 1)
    if not work.updates:
        return wide
    narrow = placement.value_bytes < _WIDE_BYTES
    held = chunk * max(1, _HELD_ELEMENTS // (chunk * size.vocabulary)) if narrow else 0
    waiting = min(held, tokens) * size.vocabulary * placement.value_bytes
    parts = math.ceil(tokens / held) if narrow else math.ceil(tokens / chunk)
    value = _WIDE_BYTES if parts > 1 or not narrow else placement.value_bytes
    own = 0 if work.lora else size.vocabulary * size.hidden * value
    return wide + waiting + own


def _packed(size: ModelSize, placement: Placement) -> int:
    """Weights laid out anew for decoding: queries, keys and values in one; on a CPU all."""
    if placement.packs_weights:
        return size.matmul_parameters * placement.value_bytes
    return size.layers * size.attention_parameters * placement.value_bytes


def _recorded(work: StageWork, size: ModelSize, placement: Placement) -> int:
    """What a step that trains on its sampler's forward pass keeps of it, where one can."""
    tokens = work.prompts_per_batch * work.rows_per_prompt * work.max_new_tokens
    alone = placement.ranks == 1 and placement.packs_weights and not placement.checkpointing
    if not (alone and work.updates) or size.hidden < SMALLEST_RECORDED:
        return 0
    if tokens > work.micro_batch_tokens:
        return 0
    return tokens * size.layers * activation_values(size) * placement.value_bytes


def _with_tokens(
    memory: DeviceMemory,
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    limit_bytes: float,
) -> DeviceMemory:
    """Micro-batches as large as asked for, or halved, as the engine does where memory runs out,
    until they fit or are one response."""
    trains = work.updates > 0
    groups = groups_of_rank(work.groups_per_update, placement.ranks)
    tokens = min(work.micro_batch_tokens, groups * work.group_tokens)
    response = math.ceil(work.group_tokens / max(1, work.rows_per_prompt))
    reader = size if trains or beside is None else beside
    while True:
        tried = replace(
            memory,
            micro_batch_tokens=tokens,
            activations=_activations(reader, tokens, placement, kept=trains),
            head=_head(work, reader, tokens, placement, two=beside is not None),
        )
        if tried.resident + tried.training <= limit_bytes or tokens <= response:
            return tried
        tokens = max(response, math.ceil(tokens / 2))


def _with_rows(
    memory: DeviceMemory,
    work: StageWork,
    size: ModelSize,
    placement: Placement,
    limit_bytes: float,
) -> DeviceMemory:
    """As many rows at once as there is room for, and no fewer than one prompt's."""
    own = groups_of_rank(work.prompts_per_batch, placement.ranks) * work.rows_per_prompt
    drawn = own * work.max_new_tokens * _DRAWN_BYTES
    logits = size.vocabulary * (
        _WIDE_BYTES + (placement.value_bytes if placement.value_bytes < _WIDE_BYTES else 0)
    )
    cache = work.max_new_tokens * size.kv_values_per_token * placement.value_bytes * _CACHE_SLACK
    wanted = min(MOST_ROWS, own)
    fewest = min(work.rows_per_prompt, wanted)
    room = limit_bytes - memory.resident - memory.sampling - drawn
    fits = room / max(cache + logits, 1.0)
    rows = wanted if fits >= wanted else max(fewest, int(fits))
    return replace(
        memory, rows=rows, kv_cache=math.ceil(rows * cache), drawing=drawn + rows * logits
    )
