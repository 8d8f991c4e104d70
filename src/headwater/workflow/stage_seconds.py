"""How long a stage takes on so many ranks, and with what: a model of its steps.

All times are what one rank waits or works on average; they add up to the time of the clock. What
the slowest rank or the longest response makes the others wait for is `idle`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from headwater.models.size import ModelSize
from headwater.workflow.calibration import Calibration
from headwater.workflow.device_memory import (
    DeviceMemory,
    Placement,
    groups_of_rank,
    micro_batches,
)
from headwater.workflow.response_lengths import ResponseLengths
from headwater.workflow.stage_work import StageWork

#: AdamW reads master, gradient and two moments and writes all but the gradient; the norm reads
#: the gradient once more. Bytes a parameter.
_UPDATE_BYTES = 8 * 4
#: Weights are saved with their moments: bytes a parameter. A stage may spend this share on it.
_SAVED_BYTES, _SAVING_SHARE = 12, 0.05


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where a stage runs: devices of a node, verifier workers, vLLM servers.

    servers: of rollouts, and devices of each; 0 where the ranks sample. scorers: devices of the
    teacher's server; 0 where the ranks score.
    """

    per_node: int = 8
    verifier_workers: int = 1
    servers: int = 0
    server_devices: int = 1
    server_rows: int = 512
    scorers: int = 0


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of the clock by what a rank does on average.

    sampling: decoding. training: forward, backward and update. scoring: forward passes of teacher
    or reference. communication: what computing does not hide. verifying: grading. pushing:
    weights to servers. other: starting, loading, saving, ledger, what each update costs. tail:
    places of ended responses that wait for the longest of the batch. idle: ranks that have fewer
    groups than others, or none.
    """

    sampling: float = 0.0
    training: float = 0.0
    scoring: float = 0.0
    communication: float = 0.0
    verifying: float = 0.0
    pushing: float = 0.0
    other: float = 0.0
    tail: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        """Seconds from beginning to end."""
        return sum(asdict(self).values())

    def shares(self) -> dict[str, float]:
        """Part -> its share of the whole."""
        whole = max(self.total, 1e-12)
        return {name: seconds / whole for name, seconds in asdict(self).items()}


def stage_seconds(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    memory: DeviceMemory,
    fleet: Fleet,
    rates: Calibration,
) -> StageSeconds:
    """The time of `work`, with the rows and micro-batches that `memory` has room for."""
    decoding, tail, without_prompts = _sampling(work, size, placement, memory.rows, fleet, rates)
    micros = micro_batches(work, placement.ranks, memory.micro_batch_tokens)
    training, without_groups = _training(work, size, placement, micros, rates)
    scoring = _scoring(work, size, beside, placement, fleet, rates)
    communication = _communication(
        work, size, beside, placement, micros, fleet, rates, training + scoring
    )
    pushes = work.rollout_batches if fleet.servers and work.updates else 0
    push = size.parameters * placement.value_bytes / rates.push_bandwidth + rates.push_seconds
    found = StageSeconds(
        sampling=decoding,
        training=training,
        scoring=scoring,
        communication=communication,
        verifying=work.verifier_calls * rates.verifier_seconds / fleet.verifier_workers,
        pushing=pushes * push,
        other=_fixed(work, size, beside, placement, rates),
        tail=tail,
        idle=without_prompts + without_groups,
    )
    saving = found.total * _saving_share(work, size, rates)
    return replace(found, other=found.other + saving)


def decode_step_seconds(
    rows: float, tokens_cached: float, size: ModelSize, value_bytes: int, rates: Calibration
) -> float:
    """One step of decoding: launching, and the longer of reading and multiplying.

    tokens_cached: of all rows together.
    """
    read = size.matmul_parameters + tokens_cached * size.kv_values_per_token
    attention = 2.0 * size.layers * size.attention_width * tokens_cached * 2
    products = 2.0 * size.matmul_parameters * rows + attention
    return size.layers * rates.decode_layer_seconds + max(
        read * value_bytes / rates.memory_bandwidth,
        products / rates.decoding_rate(size.parameters),
    )


def forward_flops(size: ModelSize, length: float) -> float:
    """Per token: two a parameter, and attention to half of the sequence on average."""
    return 2.0 * size.matmul_parameters + 2.0 * size.layers * size.attention_width * length


def batch_decoding_seconds(
    lengths: ResponseLengths,
    rows: float,
    at_once: float,
    size: ModelSize,
    value_bytes: int,
    rates: Calibration,
) -> tuple[float, float]:
    """Seconds to draw `rows` responses, `at_once` of them together; and of these the seconds of
    places that stand empty until the longest ends.

    While responses wait for a place every place is taken; then the batch runs dry, position by
    position, as responses end.
    """
    if rows <= 0:
        return 0.0, 0.0
    at_once = min(rows, max(at_once, 1.0))
    queued = (rows - at_once) * lengths.mean / at_once  # steps with every place taken
    half_full = at_once * lengths.mean / 2
    seconds = queued * decode_step_seconds(at_once, half_full, size, value_bytes, rates)
    empty = 0.0
    longest = lengths.longest_of(at_once)
    for start, end in lengths.pieces():
        steps = min(end, longest) - start
        if steps <= 0:
            break
        middle = start + steps / 2
        live = max(1.0, at_once * lengths.under_way(middle))
        took = steps * decode_step_seconds(live, live * middle, size, value_bytes, rates)
        seconds += took
        empty += took * (1 - live / at_once)
    return seconds, empty


def _sampling(
    work: StageWork,
    size: ModelSize,
    placement: Placement,
    rows: int,
    fleet: Fleet,
    rates: Calibration,
) -> tuple[float, float, float]:
    """Seconds that a rank or server decodes, at which ended responses wait for the longest, and
    at which it has nothing to decode while others do. Prompts' prefill is left out."""
    if not work.rollouts:
        return 0.0, 0.0, 0.0
    lengths = ResponseLengths(work.mean_new_tokens, work.max_new_tokens)
    samplers = fleet.servers or placement.ranks
    prompts = work.prompts_per_batch
    most = groups_of_rank(prompts, samplers) * work.rows_per_prompt
    at_once = fleet.server_rows if fleet.servers else rows
    speed = rates if not fleet.servers else _together(rates, fleet.server_devices)
    value = placement.value_bytes
    slowest, _ = batch_decoding_seconds(lengths, most, at_once, size, value, speed)
    active = min(samplers, prompts)  # the others have no prompt
    own, dry = batch_decoding_seconds(
        lengths, prompts * work.rows_per_prompt / active, at_once, size, value, speed
    )
    # The slowest rank also has the longest of all responses, not only of its own.
    tail = lengths.longest_of(prompts * work.rows_per_prompt) - lengths.longest_of(most)
    alone = decode_step_seconds(1.0, lengths.longest, size, value, speed)
    slowest += max(0.0, tail) * alone
    own, dry = min(own, slowest) * active / samplers, dry * active / samplers
    batches = work.rollout_batches
    return batches * (own - dry), batches * dry, batches * (slowest - own)


def _together(rates: Calibration, devices: int) -> Calibration:
    """One server's devices as one: products and bandwidth add up, less what they exchange."""
    share = 1.0 if devices == 1 else rates.server_share
    return replace(
        rates,
        memory_bandwidth=rates.memory_bandwidth * devices * share,
        decoding_flops=rates.decoding_flops * devices * share,
        small_decoding_flops=rates.small_decoding_flops * devices * share,
        decode_layer_seconds=rates.decode_layer_seconds * (1.0 if devices == 1 else 2.0),
    )


def _training(
    work: StageWork, size: ModelSize, placement: Placement, micros: int, rates: Calibration
) -> tuple[float, float]:
    """(seconds that a rank trains on average, seconds it waits for the one with most groups)."""
    if not work.updates:
        return 0.0, 0.0
    passes = 4.0 if placement.checkpointing else 3.0
    products = passes * work.trained_tokens * forward_flops(size, work.mean_new_tokens)
    even = products / placement.ranks / rates.training_rate(size.parameters)
    groups, ranks = work.groups_per_update, placement.ranks
    slowest = even * ranks * groups_of_rank(groups, ranks) / max(groups, 1)
    launching = work.updates * micros * size.layers * rates.train_layer_seconds * (passes / 3.0)
    moved = work.updates * math.ceil(size.parameters / ranks)
    if placement.offload:  # gradients out, weights in for each pass; the host's memory updates
        updating = moved * 4 * (1 + 2 * micros) / rates.host_bandwidth
        updating += moved * _UPDATE_BYTES / rates.host_memory_bandwidth
    else:
        updating = moved * _UPDATE_BYTES / rates.memory_bandwidth
    return even + launching + updating, slowest - even


def _scoring(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    fleet: Fleet,
    rates: Calibration,
) -> float:
    """Forward passes of the teacher (or the model itself), and of a reference."""
    products = 0.0
    reader = beside or size
    if work.scored:
        products += work.generated_tokens * forward_flops(reader, work.mean_new_tokens)
    if work.referenced:
        products += work.trained_tokens * forward_flops(size, work.mean_new_tokens)
    devices = fleet.scorers or placement.ranks
    return products / devices / rates.scoring_rate(reader.parameters)


def collective_seconds(
    received: float, collectives: float, ranks: int, per_node: int, rates: Calibration
) -> float:
    """`collectives` rings over all ranks in which each receives `received` bytes in all.

    A ring is as fast as its slowest link: the one between nodes, where there are several.
    """
    if ranks == 1:
        return 0.0
    bandwidth = rates.intra_bandwidth if ranks <= per_node else rates.inter_bandwidth
    latency = rates.collective_seconds + rates.hop_seconds * (ranks - 1)
    return received * (ranks - 1) / ranks / bandwidth + collectives * latency


def _communication(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    micros: int,
    fleet: Fleet,
    rates: Calibration,
    hides: float,
) -> float:
    """Gathering and reducing that is not hidden behind `hides` seconds of computing, and every
    rank's rollouts told to all."""
    ranks, value = placement.ranks, placement.value_bytes
    if ranks == 1:
        return 0.0

    def rings(received: float, collectives: float) -> float:
        return collective_seconds(received, collectives, ranks, fleet.per_node, rates)

    units = size.layers + 1
    passes = work.updates * micros
    layers = size.layers * size.layer_parameters
    # Layers are gathered forward and backward, the root once; gradients are reduced in float32.
    hidden = passes * rings((2 * layers + size.root_parameters) * value, 2 * units - 1)
    hidden += passes * rings(size.parameters * 4, units)
    if beside is not None and placement.scores:
        readings = passes or work.rollout_batches
        hidden += readings * rings(beside.parameters * value, beside.layers + 1)
    exposed = hidden - min(hidden, hides) * rates.overlap
    exposed += work.generated_tokens * rates.exchange_seconds
    if work.rollouts and placement.samples:
        exposed += work.rollout_batches * rings(size.parameters * value, units)
    return exposed


def _fixed(
    work: StageWork,
    size: ModelSize,
    beside: ModelSize | None,
    placement: Placement,
    rates: Calibration,
) -> float:
    """Starting, loading, publishing, saving, ledger, and what each update costs."""
    loaded = size.parameters * 4 + (beside.parameters * placement.value_bytes if beside else 0)
    published = size.parameters * 4 * 2 if work.updates else 0  # written, and read for its hash
    seconds = rates.stage_seconds + (loaded + published) / rates.disk_bandwidth
    seconds += work.updates * rates.update_seconds
    seconds += ledger_writes(work) * rates.ledger_seconds
    return seconds


def ledger_writes(work: StageWork) -> int:
    """Transactions: each batch's sampling, each batch's labels, each update."""
    graded = work.rollout_batches if work.verifier_calls else 0
    return work.rollout_batches + graded + work.updates


def _saving_share(work: StageWork, size: ModelSize, rates: Calibration) -> float:
    """Share of the time that checkpoints add (`stages.learner` spaces them so)."""
    if not work.updates:
        return 0.0
    one = size.parameters * _SAVED_BYTES / rates.disk_bandwidth
    return one / max(work.checkpoint_seconds, one / _SAVING_SHARE, 1e-9)
