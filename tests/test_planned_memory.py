"""The plan's formulas of memory beside what the engine holds, byte by byte, on a small model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from headwater.config.lora import LoRA
from headwater.config.stages import GRPOStage
from headwater.engine import decoder
from headwater.engine.adapters import Adapters, prepare_adapters
from headwater.engine.decoder import decoder_of
from headwater.engine.forward import hidden_at_targets, load_engine_model
from headwater.engine.nf4 import NF4
from headwater.engine.packing import PackedGroup, pack
from headwater.engine.recording import RecordedForward
from headwater.engine.update import Updater
from headwater.losses.chunked_head import chunk_tokens
from headwater.models.size import model_size
from headwater.models.tiny import tiny_model
from headwater.models.tiny_sizes import tiny_config_values
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.workflow import device_memory as planning
from headwater.workflow.device_memory import (
    DeviceMemory,
    Placement,
    activation_values,
    device_memory,
)
from headwater.workflow.stage_work import StageWork

NAME, GROUPS, GROUP, PROMPT, LENGTH = "teacher", 3, 4, 5, 40
SIZE = model_size(tiny_config_values(NAME))
CPU = torch.device("cpu")
TOKENS = GROUPS * GROUP * LENGTH
WORK = StageWork(
    updates=1,
    trained_tokens=TOKENS,
    rollouts=GROUPS * GROUP,
    rollout_batches=1,
    max_new_tokens=LENGTH,
    mean_new_tokens=LENGTH,
    prompts=GROUPS,
    micro_batch_tokens=TOKENS,
    groups_per_update=GROUPS,
    group_tokens=GROUP * LENGTH,
)


def planned(dtype: torch.dtype, lora: LoRA | None = None) -> DeviceMemory:
    value_bytes = torch.finfo(dtype).bits // 8
    work = replace(WORK, lora=lora)
    return device_memory(work, SIZE, None, Placement(value_bytes=value_bytes, packs_weights=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(NAME, 0).save_pretrained(path)
    return path


def in_training(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Updater]:
    model = load_engine_model(folder, torch.float32, CPU)
    return model, Updater(model, GRPOStage(), 10, dtype)


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of different memory."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_moments_are_what_the_updater_holds(folder: Path, dtype: torch.dtype) -> None:
    model, updater = in_training(folder, dtype)
    plan = planned(dtype)
    assert size_of(updater.masters) == plan.masters
    assert size_of(updater._optimizer.means + updater._optimizer.squares) == plan.moments
    both = size_of([*updater.masters, *model.parameters()])
    assert both == plan.masters + plan.training_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_adapters_hold_what_the_plan_says(
    folder: Path, dtype: torch.dtype, base: str, targets: str | list[str]
) -> None:
    pytest.importorskip("peft")
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        targets = "all-linear"
    lora = LoRA(rank=3, target_modules=targets, base=base)
    model = load_engine_model(folder, torch.float32, CPU)
    start = prepare_adapters(model, lora, folder, seed=0)
    adapters = Adapters(model, start, dtype=dtype, device=CPU)
    updater = Updater(model, GRPOStage(), 10, dtype, trained=adapters)
    plan = planned(dtype, lora)
    kept = [one.base for one in adapters._adapted]
    bases = sum(one.bytes if isinstance(one, NF4) else one.nbytes for one in kept)
    assert size_of(updater.masters) + bases == plan.masters
    assert size_of(updater._optimizer.means + updater._optimizer.squares) == plan.moments
    assert size_of(model.parameters()) == plan.training_weights == plan.sampling_weights
    assert plan.gradients < planned(dtype).gradients / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_for_the_backward_pass_what_the_plan_says(
    folder: Path, dtype: torch.dtype
) -> None:
    model, _ = in_training(folder, dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    groups = [
        PackedGroup(
            tuple(range(6, 6 + PROMPT)),
            tuple(tuple(10 + (row + i) % 40 for i in range(LENGTH)) for row in range(GROUP)),
            tuple(range(group * GROUP, (group + 1) * GROUP)),
        )
        for group in range(GROUPS)
    ]
    tokens = pack(groups, dtype=dtype, device="cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_at_targets(model, tokens)
    assert hidden.requires_grad
    # the plan's tokens are responses; the flat row has the prompts too, and no last tokens
    wide = [t for t in kept if t.dim() >= 2 and t.shape[0] == tokens.tokens]
    value_bytes = torch.finfo(dtype).bits // 8
    found = size_of(t for t in wide if t.dtype == dtype) / tokens.tokens / value_bytes
    # a layer's output is the next one's input; the last one's belongs to the final norm
    assert found == pytest.approx(SIZE.layers * activation_values(SIZE), rel=0.05)


def test_decoding_packs_what_it_multiplies_with(folder: Path) -> None:
    model, _ = in_training(folder, torch.float32)
    made = decoder_of(model, SIZE.vocabulary)
    packed = 0
    for layer in made._layers:  # type: ignore[attr-defined]
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        packed += sum(linear.weight.numel() for linear in linears)
    packed += made._head.weight.numel()  # type: ignore[attr-defined]
    assert packed * 4 == pytest.approx(planned(torch.float32).packed_weights, rel=0.01)  # no norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_pass_is_as_large_as_the_plan_says(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(dtype).recorded == 0  # too small a model
    assert decoder.SMALLEST_RECORDED == planning.SMALLEST_RECORDED
    for module in (decoder, planning):
        monkeypatch.setattr(module, "SMALLEST_RECORDED", 1)
    model = load_engine_model(folder, dtype, CPU)
    recorded = RecordedForward(10**6)
    settings = SamplerSettings(1.0, LENGTH, (2,), SIZE.vocabulary, forbid_end=True)
    requests = [SampleRequest((7,) * PROMPT, tuple(range(GROUP))) for _ in range(GROUPS)]
    InProcessSampler(model, settings).sample(requests, recorded)
    # the plan's tokens are responses; recorded are the prompts too, and no last tokens
    found = size_of(recorded._layers) * TOKENS / (GROUPS * (PROMPT + GROUP * (LENGTH - 1)))
    assert found == pytest.approx(planned(dtype).recorded)


def test_chunks_of_logits_are_as_long_as_the_loss_makes_them() -> None:
    for vocabulary in (100, 50_000, 151_936, 260_000):
        size = replace(SIZE, vocabulary=vocabulary, root_parameters=vocabulary * SIZE.hidden)
        work = replace(WORK, micro_batch_tokens=10**6, groups_per_update=10**5)
        found = device_memory(work, size, None, Placement(value_bytes=4)).head
        chunk = chunk_tokens(vocabulary) * vocabulary * 4
        assert found == min(chunk, 10**6 * vocabulary * 4) + vocabulary * SIZE.hidden * 4
