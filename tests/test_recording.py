"""A sampler's forward pass that is trained on: the plain gradients, and read once."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from headwater.config.lora import LoRA
from headwater.config.stages import GRPOStage, MixedStage, OPDStage
from headwater.engine import decoder, fused_layers
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, micro_batches, pack
from headwater.engine.recording import RecordedForward, is_recorded
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.stages import ahead, opd
from headwater.types import Rollout
from stage_jobs import Run, make_job, make_model
from test_engine_layers import FAMILIES, VOCAB, _family, _ours, _plain_gradients

ENDS = tuple(range(2, VOCAB, 9))
ROOM = 1 << 20


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "SMALLEST_RECORDED", 1)


def _requests(even: bool = False) -> list[SampleRequest]:
    rng = random.Random(1)
    return [
        SampleRequest(
            tuple(rng.randrange(VOCAB) for _ in range(6 if even else rng.randint(1, 9))),
            tuple(100 * p + s for s in range(3)),
        )
        for p in range(5)
    ]


def _groups(sampled: list[tuple[Rollout, ...]], rng: random.Random) -> list[PackedGroup]:
    """Some of the groups, some rows cut short: what a stage may train on."""
    groups, row = [], 0
    for number, group in enumerate(sampled):
        rows = tuple(range(row, row + len(group)))
        row += len(group)
        if number != 2:
            ids = [r.response_ids for r in group]
            cut = tuple(one[: rng.randint(1, len(one))] for one in ids)
            groups.append(PackedGroup(group[0].prompt_ids, cut, rows))
    return groups


def _gradients(
    model: PreTrainedModel, groups: list[PackedGroup], recorded: RecordedForward | None, budget: int
) -> dict[str, torch.Tensor]:
    for micro in micro_batches(groups, budget):
        batch = pack(micro, dtype=model.dtype, device="cpu")
        known = None if recorded is None else recorded.read(micro, batch.input_ids[0])
        hidden = hidden_at_targets(model, batch, known)
        loss = cross_entropy(batch.target_ids_T, (batch.row_T + 1).to(hidden.dtype))
        chunked_head_loss(hidden, head_weight(model), loss).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _sampled(
    model: PreTrainedModel, requests: list[SampleRequest], **settings: Any
) -> tuple[list[tuple[Rollout, ...]], RecordedForward]:
    recorded = RecordedForward(ROOM)
    max_rows = settings.pop("max_rows", 512)
    sampler = InProcessSampler(
        model, SamplerSettings(1.0, 30, ENDS, VOCAB, **settings), max_rows=max_rows
    )
    return sampler.sample(requests, recorded), recorded


@pytest.mark.parametrize("budget", [ROOM, 60])
@pytest.mark.parametrize(("even", "max_rows"), [(True, 512), (False, 512), (False, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_on_a_recorded_pass_are_the_plain_ones(
    family: str, even: bool, max_rows: int, budget: int
) -> None:
    """Rows that leave and enter, groups left out, completions cut; of several micro-batches the
    first is read and the others are computed."""
    plain = _family(family, torch.float64)
    model = _ours(plain)
    sampled, recorded = _sampled(model, _requests(even), forbid_end=even, max_rows=max_rows)
    groups = _groups(sampled, random.Random(3))
    expected = _plain_gradients(copy.deepcopy(plain), groups)
    found = _gradients(model, groups, recorded, budget)
    assert recorded.was_read
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # the library's rotary tables and norms are float32, hence not 1e-12
        scale = float(grad.abs().max())
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_a_recorded_pass_is_as_close_as_one_computed_again(family: str) -> None:
    plain = _family(family, torch.bfloat16)
    sampled, recorded = _sampled(_ours(plain), _requests())
    groups = _groups(sampled, random.Random(3))
    exact = _plain_gradients(copy.deepcopy(plain).double(), groups)

    def error(kept: RecordedForward | None) -> float:
        found = _gradients(_ours(plain), groups, kept, ROOM)
        off = [(found[name].double() - grad).square().sum() for name, grad in exact.items()]
        return float(torch.stack(off).sum().sqrt())

    assert error(recorded) < 1.3 * error(None)


def test_no_layer_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _ours(_family("llama", torch.float32))
    sampled, recorded = _sampled(model, _requests())
    groups = _groups(sampled, random.Random(3))

    def refuse(*_: object) -> None:
        raise AssertionError("a layer was computed")

    monkeypatch.setattr(fused_layers, "_compute", refuse)
    assert _gradients(model, groups, recorded, ROOM)
    with pytest.raises(AssertionError, match="was computed"):
        _gradients(model, groups, recorded, ROOM)  # it was read before


def test_a_layer_that_was_read_is_freed() -> None:
    model = _ours(_family("llama", torch.float32))
    sampled, recorded = _sampled(model, _requests())
    layers = [weakref.ref(layer) for layer in recorded._layers]
    assert len(layers) == 2
    groups = _groups(sampled, random.Random(3))
    known = recorded.read(groups, pack(groups, dtype=torch.float32, device="cpu").input_ids[0])
    assert known is not None
    known(0)
    assert [layer() is None for layer in layers] == [True, False]
    with pytest.raises(ValueError, match="layer 0 is not the next of 2"):
        known(0)


def test_other_tokens_than_were_recorded_are_refused() -> None:
    model = _ours(_family("llama", torch.float32))
    sampled, recorded = _sampled(model, _requests())
    groups = _groups(sampled, random.Random(3))
    ids = pack(groups, dtype=torch.float32, device="cpu").input_ids[0]
    with pytest.raises(ValueError, match="not the tokens that were recorded"):
        recorded.read(groups, ids + 1)
    assert recorded.read(groups, ids) is not None


def _library_layers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> RecordedForward:
    monkeypatch.setattr(decoder, "parameters_of", lambda layer: None)
    return RecordedForward(ROOM)


def _small_model(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> RecordedForward:
    monkeypatch.setattr(decoder, "SMALLEST_RECORDED", 256)
    return RecordedForward(ROOM)


def _little_room(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> RecordedForward:
    prompts = [len(request.prompt_ids) for request in _requests()]
    padded = 5 * max(prompts) + 15 * 30
    assert RecordedForward(padded).begin(prompts, [3] * 5, 30)
    return RecordedForward(padded - 1)


@pytest.mark.parametrize("reason", [_library_layers, _small_model, _little_room])
def test_what_cannot_be_recorded_is_computed(
    reason: Callable[..., RecordedForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _ours(_family("llama", torch.float32))
    expected, _ = _sampled(model, _requests())
    recorded = reason(model, monkeypatch)
    sampler = InProcessSampler(model, SamplerSettings(1.0, 30, ENDS, VOCAB))
    found = sampler.sample(_requests(), recorded)
    assert [[r.response_ids for r in g] for g in found] == [
        [r.response_ids for r in g] for g in expected
    ]
    assert recorded.read(_groups(found, random.Random(3)), torch.zeros(1)) is None


def test_where_memory_ran_out_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _ours(_family("llama", torch.float32))
    expected, _ = _sampled(model, _requests())
    lines, calls = RecordedForward.lines, []

    def failing(self: RecordedForward, layer: int) -> torch.Tensor:
        calls.append(layer)
        if len(calls) == 9:
            raise MemoryError
        return lines(self, layer)

    monkeypatch.setattr(RecordedForward, "lines", failing)
    found, recorded = _sampled(model, _requests())
    assert len(calls) == 9
    assert not recorded._layers
    assert [[r.response_ids for r in g] for g in found] == [
        [r.response_ids for r in g] for g in expected
    ]


# --- stages -------------------------------------------------------------------------------------

STEPS = 4
ROLLOUT: dict[str, Any] = {"lr": 1e-3, "steps": STEPS, "prompts_per_step": 4, "group_size": 4}
CONFIGS = {
    "grpo": GRPOStage(**ROLLOUT),
    "grpo-twice": GRPOStage(**ROLLOUT, updates_per_batch=2),
    "grpo-lora": GRPOStage(**ROLLOUT, lora=LoRA(rank=4)),
    "opd": OPDStage(**ROLLOUT),
    "mixed": MixedStage(**ROLLOUT),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=20)


@pytest.fixture
def make_run(student: Path, teacher: Path, tmp_path: Path) -> Callable[[str, str], Run]:
    def make(name: str, folder: str) -> Run:
        kind = name.partition("-")[0]
        inputs: dict[str, Any] = {"model_dir": student}
        if kind != "grpo":
            inputs["teacher_dir"] = teacher
        job = make_job(kind, CONFIGS[name], tmp_path / folder, **inputs)
        return Run(job, labels=kind != "opd")

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stage_learns_the_same_from_a_recorded_pass(
    name: str, make_run: Callable[[str, str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = make_run(name, "recorded").start()
    monkeypatch.setattr(ahead, "is_recorded", lambda step: False)
    computed = make_run(name, "computed").start()
    rows, plain = recorded.metrics(), computed.metrics()
    assert [row.pop("forward_recorded") for row in plain] == [0.0] * STEPS
    reused = [row.pop("forward_recorded") for row in rows]
    # the first is measured; a step in which no group has a gradient reads nothing
    assert reused == [
        float(step > 0 and row["trained_tokens"] > 0) for step, row in enumerate(rows)
    ]
    assert sum(reused) > 0
    for row, expected in zip(rows, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    weights = [load_file(run.model_dir / "model.safetensors") for run in (recorded, computed)]
    for key, expected in weights[1].items():
        torch.testing.assert_close(weights[0][key], expected, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["grpo", "opd"])
def test_a_stage_that_was_stopped_records_the_same_steps(
    name: str, make_run: Callable[[str, str], Run]
) -> None:
    whole = make_run(name, "whole").start()
    resumed = make_run(name, "resumed").interrupted_at(2).start()
    resumed.assert_equals(whole)


def test_a_recorded_step_that_does_not_fit_is_computed_in_smaller_pieces(
    make_run: Callable[[str, str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run("opd", "whole").start()
    real, failed = hidden_at_targets, []

    def limited(model: Any, batch: Any, known: Any = None) -> torch.Tensor:
        hidden = real(model, batch, known)
        if known is not None and not failed:
            failed.append(known)
            hidden.register_hook(_fails)
        return hidden

    monkeypatch.setattr(opd, "hidden_at_targets", limited)
    small = make_run("opd", "small").start()
    assert failed
    assert [alert.guard for alert in small.alerts()] == ["out_of_memory"]
    # the step is computed, and the lower budget leaves no room for a record afterwards
    assert [row["forward_recorded"] for row in small.metrics()] == [0.0, 1.0, 0.0, 0.0]
    for row, expected in zip(small.metrics(), whole.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def _fails(gradient: torch.Tensor) -> None:
    raise MemoryError


def test_one_step_in_sixteen_measures_the_sampler() -> None:
    assert [step for step in range(40) if not is_recorded(step)] == [0, 16, 32]
