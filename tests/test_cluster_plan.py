"""Planning for clusters: memory by part, seconds by what they go to, schedules, constants."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headwater.api import load
from headwater.config.compute import Compute
from headwater.errors import InputError
from headwater.models.known_sizes import known_config
from headwater.models.size import ModelSize, model_size
from headwater.report.plan_view import print_plan
from headwater.workflow.calibration import CPU, GPU, NUMBERS, Calibration, calibrated
from headwater.workflow.cost import Machine
from headwater.workflow.critical_path import Duty, schedule
from headwater.workflow.device_memory import Placement, device_memory, micro_batches
from headwater.workflow.devices import DeviceNeed, Offer, device_need
from headwater.workflow.estimate import Plan, estimate
from headwater.workflow.prepare import prepare_study
from headwater.workflow.response_lengths import ResponseLengths
from headwater.workflow.stage_seconds import (
    batch_decoding_seconds,
    collective_seconds,
    decode_step_seconds,
)
from headwater.workflow.stage_work import StageWork

GIB = 2**30


def known(hub_id: str) -> ModelSize:
    config = known_config(hub_id)
    assert config is not None
    return model_size(config)


# Qwen3-1.7B from its published config, counted by hand.
VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 151936, 2048, 6144, 28, 16, 8, 128
LAYER = (
    HIDDEN * HEADS * HEAD_DIM * 2  # queries and output
    + HIDDEN * KV_HEADS * HEAD_DIM * 2  # keys and values
    + 3 * HIDDEN * MLP
    + 2 * HIDDEN  # norms
    + 2 * HEAD_DIM  # of queries and keys
)
ROOT = VOCABULARY * HIDDEN + HIDDEN
WHOLE = LAYERS * LAYER + ROOT
QWEN = known("Qwen/Qwen3-1.7B")
GRPO = StageWork(
    updates=10,
    trained_tokens=10 * 64 * 1000,
    rollouts=10 * 64,
    rollout_batches=10,
    max_new_tokens=1000,
    mean_new_tokens=1000,
    labels=80,
    verifier_calls=640,
    prompts=80,
    micro_batch_tokens=16_000,
    groups_per_update=8,
    group_tokens=8_000,
    checkpoint_seconds=30.0,
)
OFFER = Offer()


def memory(ranks: int, work: StageWork = GRPO, beside: ModelSize | None = None, **how: Any) -> Any:
    limit = how.pop("limit_bytes", math.inf)
    return device_memory(work, QWEN, beside, Placement(ranks=ranks, **how), limit)


# --- memory, part by part -------------------------------------------------------------------------


def test_the_size_is_the_published_one() -> None:
    assert WHOLE == QWEN.parameters == 1_720_574_976
    assert (QWEN.layer_parameters, QWEN.root_parameters) == (LAYER, ROOT)
    assert QWEN.intermediate == MLP


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)],
)
def test_sizes_of_the_smollm2_family_are_the_published_ones(size: str, parameters: int) -> None:
    assert known(f"HuggingFaceTB/SmolLM2-{size}-Instruct").parameters == parameters


def test_shards_of_weights_moments_and_gradients() -> None:
    found = memory(4)
    assert found.masters == WHOLE * 4 // 4
    assert found.moments == WHOLE * 8 // 4
    assert found.gradients == WHOLE * 4 // 4
    assert found.resident == WHOLE * 4
    eight = memory(8)
    assert eight.resident == found.resident // 2
    assert (eight.sampling_weights, eight.activations) == (WHOLE * 2, memory(4).activations // 2)


def test_sampling_takes_the_weights_whole_and_training_two_layers() -> None:
    found = memory(4)
    assert found.sampling_weights == WHOLE * 2
    assert found.packed_weights == LAYERS * HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2
    assert found.training_weights == (ROOT + 2 * LAYER) * 2
    assert found.unreduced_gradients == (ROOT + LAYER) * (2 + 4)
    alone = memory(1)
    assert alone.masters + alone.training_weights == WHOLE * (4 + 2)
    assert alone.unreduced_gradients == 0
    in_float32 = memory(1, value_bytes=4)
    assert (in_float32.masters, in_float32.training_weights) == (WHOLE * 4, 0)  # one and the same


def test_gradients_of_one_rank_are_narrow_unless_micro_batches_add_up() -> None:
    assert memory(1).gradients == WHOLE * (4 + 2)  # four micro-batches of two groups
    one = replace(GRPO, groups_per_update=2, trained_tokens=10 * 16 * 1000)
    assert memory(1, one).gradients == WHOLE * 2


def test_what_layers_keep_for_the_backward_pass() -> None:
    # input and middle, queries and what they read, keys and values, gate and up; with norms on
    # heads also queries and keys as they were before
    kept = 2 * HIDDEN + 2 * 2048 + 2048 + 2 * MLP + (2048 + 1024)
    tokens = 2 * 8 * 1000  # two groups of the rank fit into its micro-batch
    assert memory(4).micro_batch_tokens == tokens
    assert memory(4).activations == tokens * (LAYERS * kept + kept) * 2
    recomputed = memory(4, checkpointing=True)
    assert recomputed.activations == tokens * (LAYERS * HIDDEN + 2 * kept) * 2
    assert recomputed.activations < memory(4).activations / 6


def test_micro_batches_are_halved_until_they_fit_and_never_below_a_response() -> None:
    roomy = memory(4)
    tight = memory(4, limit_bytes=roomy.resident + roomy.training - 1)
    assert tight.micro_batch_tokens == roomy.micro_batch_tokens // 2
    assert memory(4, limit_bytes=0.0).micro_batch_tokens == 1000
    assert micro_batches(GRPO, 1, 16_000) == 4
    assert micro_batches(GRPO, 1, 1000) == 8 * 8
    assert micro_batches(GRPO, 64, 16_000) == 1


def test_logits_exist_a_chunk_at_a_time() -> None:
    chunk = 64  # 2^23 elements would be 55 tokens; the fewest are 64
    held = chunk * (2**26 // (chunk * VOCABULARY))
    expected = chunk * VOCABULARY * 4 + held * VOCABULARY * 2 + VOCABULARY * HIDDEN * 4
    assert memory(4).head == expected
    assert memory(4, beside=QWEN).head == expected + chunk * VOCABULARY * 4


def test_the_cache_has_room_for_the_rows_that_fit() -> None:
    row = 1000 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 2 * 17 // 16
    assert memory(4).rows == 16  # two prompts of eight
    assert memory(4).kv_cache == 16 * row
    assert memory(1).rows == 64
    logits = VOCABULARY * (4 + 2)
    assert memory(4).drawing == 16 * 1000 * 16 + 16 * logits
    base = memory(1)
    rest = base.resident + base.sampling - base.kv_cache - base.drawing
    limit = rest + 64 * 1000 * 16 + 20.5 * (row + logits)
    assert memory(1, limit_bytes=limit).rows == 20
    assert memory(1, limit_bytes=0.0).rows == 8  # a prompt's rows stay together


def test_a_teacher_or_reference_is_sharded_too() -> None:
    teacher = known("Qwen/Qwen3-8B")
    found = memory(8, replace(GRPO, scored=True), teacher)
    assert found.beside == math.ceil(teacher.parameters * 2 / 8)
    gathered = (teacher.root_parameters + 2 * teacher.layer_parameters) * 2
    assert found.training_weights == gathered  # larger than the student's
    assert memory(8, replace(GRPO, scored=True), teacher, scores=False).beside == 0


def test_offloading_moves_the_shards_to_the_host() -> None:
    found = memory(4, offload=True)
    assert (found.resident, found.host) == (0, WHOLE * 4)
    assert found.training == memory(4).training


def test_a_model_that_only_samples_has_no_optimiser() -> None:
    evaluation = StageWork(
        rollouts=64, rollout_batches=2, max_new_tokens=100, mean_new_tokens=100, prompts=8
    )
    alone, two = memory(1, evaluation), memory(2, evaluation)
    assert (alone.moments, alone.gradients, alone.masters) == (0, 0, 0)
    assert alone.sampling_weights == two.sampling_weights == WHOLE * 2
    assert two.masters == WHOLE  # its shard, in the format that computes
    served = memory(2, evaluation, samples=False)
    assert served.peak == 0, "servers hold all of it"


# --- how many ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "ranks"), [(80, 1), (40, 2), (24, 2), (16, 4), (12, 8)])
def test_the_smallest_number_of_ranks_on_which_a_stage_fits(gib: int, ranks: int) -> None:
    offer = replace(OFFER, memory_bytes=gib * GIB)
    need = device_need(GRPO, QWEN, QWEN, offer)
    assert (need.smallest, need.ranks, need.fits) == (ranks, ranks, True)
    assert need.memory.peak <= 0.9 * gib * GIB
    if ranks > 1:
        half = device_memory(GRPO, QWEN, QWEN, Placement(ranks // 2), 0.9 * gib * GIB)
        assert half.peak > 0.9 * gib * GIB


def test_recomputing_and_offloading_need_fewer_ranks() -> None:
    long = replace(GRPO, max_new_tokens=16384, mean_new_tokens=16384, group_tokens=8 * 16384)
    llama = known("meta-llama/Llama-3.1-8B")
    plain = device_need(long, llama, None, OFFER).smallest
    cheaper = Compute(activation_checkpointing=True)
    recomputed = device_need(long, llama, None, replace(OFFER, compute=cheaper)).smallest
    both = cheaper.model_copy(update={"cpu_offload": True})
    offloaded = device_need(long, llama, None, replace(OFFER, compute=both)).smallest
    assert plain is not None and recomputed is not None and offloaded is not None
    assert plain > recomputed > offloaded == 1


def test_weights_that_no_device_holds_whole_want_servers() -> None:
    llama = known("meta-llama/Llama-3.3-70B")
    need = device_need(GRPO, llama, None, OFFER)
    assert (need.smallest, need.fits) == (None, False)
    assert need.memory.sampling_weights == llama.parameters * 2 > 80 * GIB
    assert need.remedy is not None
    assert need.remedy.settings == ("compute.rollouts=vllm",)
    served = device_need(GRPO, llama, None, replace(OFFER, compute=Compute(rollouts="vllm")))
    assert served.smallest == served.ranks == need.remedy.ranks
    assert served.servers == 4  # 141 GB of weights, and as much for the cache
    assert served.devices == served.ranks + 4


def test_ranks_are_doubled_while_that_pays() -> None:
    long = replace(
        GRPO,
        updates=1000,
        trained_tokens=64_000_000,
        rollouts=64_000,
        rollout_batches=1000,
        prompts=8000,
    )
    alone = device_need(long, QWEN, None, OFFER)
    assert alone.ranks == 1
    many = device_need(long, QWEN, None, replace(OFFER, count=512))
    assert 1 < many.ranks <= 8, "eight prompts a step keep eight ranks busy"
    assert many.seconds.total * 1.4 <= alone.seconds.total
    told = replace(OFFER, compute=Compute(ranks=3))
    assert device_need(long, QWEN, None, told).ranks == 3


# --- seconds --------------------------------------------------------------------------------------

#: Round numbers, so that seconds can be worked out by hand.
ROUND = Calibration(
    about="round",
    **(dict.fromkeys(NUMBERS, 0.0) | {"verifier_seconds": 0.01, "ledger_seconds": 0.1}),
    sources={},
)
ROUND = replace(
    ROUND,
    **{name: 1e12 for name in NUMBERS if name.endswith(("_flops", "_bandwidth"))},
)


def need_of(work: StageWork, ranks: int, rates: Calibration, **compute: Any) -> DeviceNeed:
    offer = replace(OFFER, rates=rates, compute=Compute(ranks=ranks, **compute))
    return device_need(work, QWEN, None, offer)


def test_training_takes_three_forwards_a_token_or_four() -> None:
    per_token = 2.0 * QWEN.matmul_parameters + 2.0 * LAYERS * 2048 * 1000
    products = 3 * 640_000 * per_token / 1e12
    updating = 10 * 32 * WHOLE / 1e12
    found = need_of(GRPO, 1, ROUND).seconds
    assert found.training == pytest.approx(products + updating)
    assert need_of(GRPO, 2, ROUND).seconds.training == pytest.approx(found.training / 2)
    again = need_of(GRPO, 1, ROUND, activation_checkpointing=True).seconds
    assert again.training == pytest.approx(products * 4 / 3 + updating)


def test_groups_that_do_not_divide_leave_ranks_idle() -> None:
    per_token = 2.0 * QWEN.matmul_parameters + 2.0 * LAYERS * 2048 * 1000
    work = replace(GRPO, rollouts=0, rollout_batches=0, verifier_calls=0)
    assert need_of(work, 4, ROUND).seconds.idle == pytest.approx(0.0)
    three = need_of(work, 3, ROUND).seconds  # 3 + 3 + 2 groups
    whole = 3 * 640_000 * per_token / 1e12
    assert three.idle == pytest.approx(whole * (3 / 8 - 1 / 3), rel=1e-6)
    sixteen = need_of(work, 16, ROUND).seconds  # half of the ranks have none
    assert sixteen.idle == pytest.approx(whole * (1 / 8 - 1 / 16), rel=1e-6)


def test_grading_is_shared_by_workers_and_the_ledger_by_nobody() -> None:
    found = need_of(GRPO, 4, ROUND).seconds
    assert found.verifying == pytest.approx(640 * 0.01)
    workers = replace(OFFER, rates=ROUND, compute=Compute(ranks=4), verifier_workers=8)
    assert device_need(GRPO, QWEN, None, workers).seconds.verifying == pytest.approx(0.8)
    free = need_of(GRPO, 4, replace(ROUND, ledger_seconds=0.0)).seconds
    assert found.other - free.other == pytest.approx(30 * 0.1, rel=0.06)  # and checkpoints of it


def test_communication_counts_every_gathering() -> None:
    ranks, micros, batches = 4, 1, 10
    layers = LAYERS * LAYER
    micro = ((2 * layers + ROOT) * 2 + WHOLE * 4) * (ranks - 1) / ranks
    sampling = WHOLE * 2 * (ranks - 1) / ranks
    found = need_of(GRPO, ranks, ROUND).seconds
    assert found.communication == pytest.approx((10 * micros * micro + batches * sampling) / 1e12)
    hidden = need_of(GRPO, ranks, replace(ROUND, overlap=1.0)).seconds
    assert hidden.communication == pytest.approx(batches * sampling / 1e12)
    assert need_of(GRPO, 1, ROUND).seconds.communication == 0.0
    slow = replace(ROUND, inter_bandwidth=1e11)
    assert need_of(GRPO, 8, slow).seconds.communication == pytest.approx(
        need_of(GRPO, 8, ROUND).seconds.communication
    )
    assert collective_seconds(8e12, 0, 16, 8, slow) == pytest.approx(75.0)  # the slowest link


def test_latency_grows_with_the_ring() -> None:
    rates = replace(ROUND, collective_seconds=1e-3, hop_seconds=1e-5)
    assert collective_seconds(0.0, 10, 101, 8, rates) == pytest.approx(10 * 2e-3)


def test_weights_are_pushed_to_servers_every_update() -> None:
    rates = replace(ROUND, push_bandwidth=1e9, push_seconds=0.5, server_share=0.8)
    found = need_of(GRPO, 2, rates, rollouts="vllm").seconds
    assert found.pushing == pytest.approx(10 * (WHOLE * 2 / 1e9 + 0.5))
    assert need_of(GRPO, 2, rates).seconds.pushing == 0.0
    evaluation = replace(GRPO, updates=0, trained_tokens=0)
    assert need_of(evaluation, 2, rates, rollouts="vllm").seconds.pushing == 0.0


def test_a_decoding_step_reads_weights_and_cache() -> None:
    rates = replace(ROUND, decode_layer_seconds=1e-3, memory_bandwidth=1e9)
    kv = 2 * LAYERS * KV_HEADS * HEAD_DIM
    step = decode_step_seconds(4.0, 4 * 500, QWEN, 2, rates)
    assert step == pytest.approx(0.028 + (QWEN.matmul_parameters + 2000 * kv) * 2 / 1e9)


# --- how long responses are -----------------------------------------------------------------------


def test_lengths_have_their_mean_and_their_limit() -> None:
    lengths = ResponseLengths(1000, 8000)
    steps = [index + 0.5 for index in range(8000)]
    assert sum(map(lengths.under_way, steps)) == pytest.approx(1000, rel=1e-3)
    assert lengths.longest_of(1) == pytest.approx(1000, rel=1e-2)
    assert lengths.under_way(8000) == 0.0


def test_the_longest_of_many_is_much_longer_than_the_mean() -> None:
    lengths = ResponseLengths(1000, 100_000)
    harmonic = sum(1 / n for n in range(1, 65))
    assert lengths.longest_of(64) == pytest.approx(1000 * harmonic, rel=0.01)
    assert lengths.utilisation(64) == pytest.approx(1 / harmonic, rel=0.01)
    bounded = ResponseLengths(1000, 2000)
    assert 1900 < bounded.longest_of(64) <= 2000
    assert ResponseLengths(2000, 2000).longest_of(1) == 2000


def test_a_batch_ends_with_its_longest_response() -> None:
    rates = replace(ROUND, decode_layer_seconds=1e-3, decoding_flops=1e30, memory_bandwidth=1e30)
    step = LAYERS * 1e-3
    even, waiting = batch_decoding_seconds(ResponseLengths(100, 100), 64, 64, QWEN, 2, rates)
    assert (even, waiting) == (pytest.approx(100 * step), 0.0)
    queued, _ = batch_decoding_seconds(ResponseLengths(100, 100), 64, 16, QWEN, 2, rates)
    assert queued == pytest.approx(400 * step)
    ragged, waiting = batch_decoding_seconds(ResponseLengths(100, 4000), 64, 64, QWEN, 2, rates)
    assert ragged == pytest.approx(100 * sum(1 / n for n in range(1, 65)) * step, rel=0.03)
    assert waiting / ragged > 0.7


def test_ranks_without_a_prompt_make_nothing_quicker() -> None:
    rates = replace(ROUND, decode_layer_seconds=1e-3)
    work = replace(GRPO, updates=0, trained_tokens=0, mean_new_tokens=300)
    eight, more = (need_of(work, ranks, rates).seconds for ranks in (8, 32))
    drawing = eight.sampling + eight.tail + eight.idle
    assert more.sampling + more.tail + more.idle == pytest.approx(drawing)
    assert more.sampling == pytest.approx(eight.sampling / 4)
    assert more.tail == pytest.approx(eight.tail / 4)
    assert more.tail > 0


# --- side by side ---------------------------------------------------------------------------------


def test_independent_stages_run_side_by_side() -> None:
    duties = {
        "a": Duty(3.0, 2),
        "b": Duty(2.0, 2),
        "c": Duty(4.0, 2, ("a",)),
        "d": Duty(1.0, 2, ("b",)),
    }
    wide, narrow = schedule(duties, 4), schedule(duties, 2)
    assert (wide.seconds, narrow.seconds) == (7.0, 10.0)
    assert wide.longest_path == ("a", "c")
    assert wide.longest_path_seconds == 7.0
    assert wide.starts == {"a": 0.0, "b": 0.0, "d": 2.0, "c": 3.0}
    assert (wide.busy_share, narrow.busy_share) == (pytest.approx(20 / 28), 1.0)


def test_small_stages_fill_what_a_large_one_leaves() -> None:
    duties = {"large": Duty(4.0, 4), "small": Duty(1.0, 1), "next": Duty(5.0, 4)}
    found = schedule(duties, 5)
    assert found.starts == {"next": 0.0, "small": 0.0, "large": 5.0}
    assert schedule({"a": Duty(2.0, 64)}, 8).seconds == 2.0  # gets all there are
    assert schedule({}, 8).seconds == 0.0
    assert schedule({"b": Duty(1.0, 1, ("done before",))}, 1).seconds == 1.0


# --- constants ------------------------------------------------------------------------------------


def test_every_constant_has_a_source() -> None:
    for rates in (GPU, CPU):
        assert set(rates.sources) <= set(NUMBERS)
        assert {name for name, (value, _) in rates.table().items() if value < 0} == set()
        assert rates.source_of("hop_seconds") == "assumed"
    assert "data sheet" in GPU.source_of("memory_bandwidth")
    assert len(NUMBERS) == len(fields(Calibration)) - 2


def test_a_file_replaces_constants(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"about": "my machine", "training_flops": 2e11}))
    found = calibrated(path, CPU)
    assert (found.about, found.training_flops) == ("my machine", 2e11)
    assert found.source_of("training_flops") == "measured (here.json)"
    assert set(found.measured()) - set(CPU.measured()) == {"training_flops"}
    assert found.ledger_seconds == CPU.ledger_seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"trainig_flops": 1}', "unknown constant 'trainig_flops'.*write training_flops"),
        ('{"training_flops": 0}', "training_flops=0, expected a number above 0"),
        ('{"training_flops": true}', "training_flops=True, expected a number above 0"),
        ('{"training_flops": "fast"}', "training_flops='fast', expected a number above 0"),
        ('{"overlap": 1.5}', "overlap=1.5, expected a share from 0 to 1"),
        ('{"about": 3}', "about=3, expected text"),
        ("[1]", "holds list, expected a JSON object"),
        ("{", "expected a JSON file of constants"),
    ],
)
def test_a_file_of_anything_else_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        calibrated(path, CPU)


# --- whole plans ----------------------------------------------------------------------------------


@cache
def plan_of(name: str, *overrides: str, count: int | None = None, mean: int = 2000) -> Plan:
    study = prepare_study(load(name, overrides, profile="fast"), planning=True)
    offer = replace(OFFER, count=count, compute=study.recipe.compute)
    return estimate(study, Machine("cuda", 1, 1, offer), mean_response=mean)


@pytest.mark.parametrize("name", ["qwen3-1.7b", "llama-8b"])
def test_shipped_recipes_are_planned_for_a_cluster(name: str) -> None:
    plan = plan_of(name, count=64)
    plain = plan.as_dict()
    json.dumps(plain)
    assert plain["cluster"]["devices"] == 64
    assert plain["cluster"]["constants"]["overlap"] == (0.8, "assumed")
    found = plan.cluster.schedule
    assert found.seconds == plan.to_do.seconds >= found.longest_path_seconds > 0
    rows = [row["devices"] for row in plain["stages"] if row["devices"] is not None]
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert row["memory"]["peak"] > 0
    assert plan.device_hours == pytest.approx(sum(row["device_hours"] for row in rows))
    assert plan.assumptions is not None
    assert "A model, not a measurement" in plan.assumptions
    assert "--nproc N" in plan.assumptions


def test_what_does_not_fit_is_said_with_its_cure() -> None:
    plan = plan_of("llama-8b", count=64)
    (never,) = [w for w in plan.warnings if "fit on no number of" in w and "grpo of teacher" in w]
    assert "set " in never and "compute.rollouts=vllm" in never and "ranks" in never
    served = plan_of(
        "llama-8b",
        "compute.rollouts=vllm",
        "compute.activation_checkpointing=true",
        count=64,
    )
    assert not any("fit on no number of" in warning for warning in served.warnings)
    assert all(s.devices.servers for s in served.stages if s.devices and s.kind == "grpo")


def test_too_few_gpus_or_ranks_are_said() -> None:
    (few,) = [w for w in plan_of("qwen3-1.7b", count=1).warnings if "--gpus 1" in w]
    assert "is too few" in few
    told = plan_of("qwen3-1.7b", "compute.ranks=2", count=8)
    (short,) = [w for w in told.warnings if "compute.ranks=2 is too few" in w]
    assert "--nproc" in short
    assert any(not s.devices.fits for s in told.stages if s.devices)


def test_a_reference_and_a_teacher_are_held_beside() -> None:
    plan = plan_of("qwen3-1.7b")
    beside = {(s.kind, s.model): s.devices.memory.beside for s in plan.stages if s.devices}
    assert beside["grpo", "student"] > 0, "a KL penalty holds the model as it was"
    assert beside["opd", "student"] > 0
    assert beside["teacher_rollouts", "teacher"] == 0, "the teacher that samples is held once"


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_fits_its_terminal(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    print_plan(console, plan_of("qwen3-1.7b", count=16))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for heading in ("tok/s", "verify", "idle", "weights", "layers", "longest"):
        assert heading in text
    assert "16 GPUs in nodes of 8" in text
