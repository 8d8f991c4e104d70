"""Memory that runs out: what failed is done again in smaller pieces, to the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.distillation import FullVocabulary
from headwater.config.stages import (
    GRPOStage,
    KLPenalty,
    OPDStage,
    SFTStage,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.engine.memory import OutOfMemory, is_out_of_memory
from headwater.engine.packing import PackedGroup, TokenBatch, micro_batches
from headwater.engine.token_budget import TokenBudget
from headwater.engine.update import Updater
from headwater.errors import StageError
from headwater.models.tiny import tiny_model
from headwater.rollout import sampler
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.stages import grpo, opd, supervised
from headwater.types import LossSums
from stage_jobs import SAMPLING, Run, make_job, make_model

SAID = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
FAILURES = (
    RuntimeError(SAID),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
)
#: Sampled positions, which the micro-batch decides.
SAMPLED = {"top_overlap", "overlap_mass"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=10)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    config = TeacherRolloutsStage(targets=FullVocabulary(), sampling=SAMPLING)
    folder = tmp_path_factory.mktemp("cached")
    job = make_job("teacher_rollouts", config, folder, teacher_dir=teacher)
    return Run(job).start().job.output_dir


# --- what an allocation that failed looks like --------------------------------------------------


@pytest.mark.parametrize("error", FAILURES)
def test_failed_allocations_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes [2, 3] and [4] cannot be multiplied"))
    assert not is_out_of_memory(ValueError(SAID))


def test_the_real_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


# --- dividing -----------------------------------------------------------------------------------


def _group(prompt: int, *completions: int) -> PackedGroup:
    rows = tuple(range(len(completions)))
    return PackedGroup((1,) * prompt, tuple((2,) * n for n in completions), rows)


def _sizes(micros: list[tuple[PackedGroup, ...]]) -> list[list[int]]:
    return [[len(group.completions) for group in micro] for micro in micros]


def test_groups_are_divided_only_when_asked_and_no_row_is_lost() -> None:
    groups = [_group(4, 10, 10, 10, 10, 10, 10, 10, 10)]
    assert _sizes(list(micro_batches(groups, 30))) == [[8]]
    assert _sizes(list(micro_batches(groups, 44, divide=True))) == [[4], [4]]
    assert _sizes(list(micro_batches(groups, 30, divide=True))) == [[2]] * 4
    assert _sizes(list(micro_batches(groups, 1, divide=True))) == [[1]] * 8
    uneven = [_group(2, 3, 9, 4, 7, 5)]
    for budget in range(1, 60):
        parts = [part for micro in micro_batches(uneven, budget, divide=True) for part in micro]
        rows = sorted(
            pair for part in parts for pair in zip(part.rows, part.completions, strict=True)
        )
        assert rows == list(zip(uneven[0].rows, uneven[0].completions, strict=True))
        assert all(part.prompt_ids == uneven[0].prompt_ids for part in parts)


def test_halving_starts_from_what_was_tried_and_ends_at_single_responses() -> None:
    groups = [_group(4, 10, 10, 10, 10), _group(4, 8, 8, 8, 8)]
    budget = TokenBudget(16384)
    assert _sizes(budget.micro_batches(groups)) == [[4, 4]]
    tried = []
    while budget.halve(groups):
        tried.append(budget.tokens)
    assert tried == [44, 22, 10]  # 88 tokens were tried first, not 16384
    assert _sizes(budget.micro_batches(groups)) == [[1]] * 8
    assert not TokenBudget(16384).halve([_group(4, 10)])


# --- the update ---------------------------------------------------------------------------------


class _Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", FAILURES)
def test_a_failed_step_leaves_no_gradient_behind(error: Exception, dtype: torch.dtype) -> None:
    def loss() -> LossSums:
        return LossSums((model.weight.float() * torch.tensor([3.0, 4.0])).sum(), 1.0)

    def fails() -> LossSums:
        raise error

    model = _Weights()
    updater = Updater(model, SFTStage(lr=0.1), 2, dtype)
    before = {name: tensor.clone() for name, tensor in updater.state().items()}
    with pytest.raises(OutOfMemory):
        updater.step([loss, fails], 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in updater.state().items())
    assert updater.steps_done == 0
    assert updater.step([loss], 1.0).grad_norm == 5.0  # 10 with what the failed step collected


def test_other_errors_stay_what_they_are() -> None:
    def fails() -> LossSums:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Updater(_Weights(), SFTStage(), 1).step([fails], 1.0)


# --- stages -------------------------------------------------------------------------------------


def _little_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, backward: bool = False) -> None:
    """A forward or a backward pass of more than so many tokens does not fit."""
    for module in (grpo, opd, supervised):
        real: Callable[..., torch.Tensor] = module.hidden_at_targets

        def limited(model: Any, batch: TokenBatch, *known: Any, real: Any = real) -> torch.Tensor:
            if batch.tokens <= tokens:
                return real(model, batch, *known)
            if not backward:
                raise RuntimeError(SAID)
            hidden = real(model, batch, *known)
            hidden.register_hook(_fail)
            return hidden

        monkeypatch.setattr(module, "hidden_at_targets", limited)


def _fail(gradient: torch.Tensor) -> None:
    raise RuntimeError(SAID)


SETTINGS: dict[str, Any] = {"steps": 2, "lr": 1e-5}
ROLLOUT = SETTINGS | {"prompts_per_step": 8, "group_size": 8}
CONFIGS = {
    "grpo": GRPOStage(**ROLLOUT),
    "grpo-updates": GRPOStage(**ROLLOUT, updates_per_batch=2, kl=KLPenalty(coefficient=0.1)),
    "grpo-exact": GRPOStage(**ROLLOUT, kl=KLPenalty(coefficient=0.1, estimator="exact")),
    "opd": OPDStage(**ROLLOUT),
    "warmup": WarmupStage(**SETTINGS, batch_size=8),
    "sft": SFTStage(**SETTINGS, batch_size=8),
}


@pytest.fixture
def make_run(tmp_path: Path, student: Path, teacher: Path, cached: Path) -> Callable[..., Run]:
    def make(name: str, folder: str) -> Run:
        kind = name.partition("-")[0]
        inputs: dict[str, Any] = {"model_dir": student}
        inputs |= {"teacher_dir": teacher} if kind == "opd" else {}
        inputs |= {"rollouts_dir": cached} if kind == "warmup" else {}
        job = make_job(kind, CONFIGS[name], tmp_path / folder, **inputs)
        return Run(job, labels=kind in ("grpo", "sft"))

    return make


def _assert_alike(found: Run, expected: Run) -> None:
    """Equal rollouts of the first step; weights, metrics and spending but for rounding."""
    first = [[row for row in run.rollouts() if row["step"] == 0] for run in (found, expected)]
    assert first[0] == first[1]
    assert found.spent() == expected.spent()
    for ours, theirs in zip(found.metrics(), expected.metrics(), strict=True):
        assert theirs["grad_norm"] > 1e-3  # of a gradient that is rounding AdamW makes a step
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - SAMPLED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    ours, theirs = (load_file(run.model_dir / "model.safetensors") for run in (found, expected))
    moved = load_file(found.job.model_dir / "model.safetensors")
    far = sum(float((theirs[name] - moved[name]).square().sum()) for name in theirs) ** 0.5
    off = sum(float((theirs[name] - ours[name]).square().sum()) for name in theirs) ** 0.5
    # AdamW divides by the size of a gradient: where that is near zero, rounding shows.
    assert off < 0.01 * far


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stage_goes_on_in_smaller_micro_batches(
    name: str, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(name, "whole").start()
    assert whole.alerts() == ()
    _little_memory(monkeypatch, tokens=30)
    small = make_run(name, "small").start()
    _assert_alike(small, whole)
    (alert,) = small.alerts()
    assert (alert.guard, alert.quantity) == ("out_of_memory", "micro_batch_tokens")
    assert alert.threshold == 16384 and alert.value <= 44
    assert len(small.told) == 1  # however often it was halved
    assert f"step {alert.step} of 2: memory ran out" in alert.words
    assert "lowered from 16384 to" in alert.words


def test_a_backward_pass_that_does_not_fit_is_done_again_too(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run("grpo", "whole").start()
    _little_memory(monkeypatch, tokens=30, backward=True)
    small = make_run("grpo", "small").start()
    _assert_alike(small, whole)
    assert len(small.alerts()) == 1


def test_a_response_that_does_not_fit_alone_ends_the_stage_with_a_cure(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    _little_memory(monkeypatch, tokens=3)
    match = r"sft \(stage .*\), step 1 of 2: a single response does not fit.*lower sampling\.max_"
    with pytest.raises(StageError, match=match):
        make_run("sft", "none").start()


def test_a_resumed_stage_keeps_the_lower_budget_and_its_alert(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _little_memory(patch, tokens=30)
        straight = make_run("grpo-updates", "straight").start()
        resumed = make_run("grpo-updates", "resumed").interrupted_at(1)
    resumed.start()  # with memory enough for what is not tried again
    resumed.assert_equals(straight)
    assert resumed.alerts() == straight.alerts()


# --- sampling -----------------------------------------------------------------------------------


@pytest.fixture
def rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    real = sampler._Decoding.step

    def allow(most: int) -> None:
        def step(decoding: sampler._Decoding) -> None:
            if decoding.rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
            real(decoding)

        monkeypatch.setattr(sampler._Decoding, "step", step)

    yield allow


def _requests() -> list[SampleRequest]:
    return [SampleRequest((5, 6, 7 + p), tuple(range(8 * p, 8 * p + 8))) for p in range(3)]


@pytest.mark.parametrize("fit", [12, 3, 1])
def test_sampling_goes_on_with_fewer_rows_and_draws_the_same(
    fit: int, rows_that_fit: Callable[[int], None]
) -> None:
    model = tiny_model("student", 0)
    model.set_attn_implementation("headwater")
    settings = SamplerSettings(1.0, 12, (2,), 60)
    whole = InProcessSampler(model, settings).sample(_requests())
    rows_that_fit(fit)
    told: list[tuple[int, int, str]] = []
    source = InProcessSampler(model, settings, on_fewer_rows=lambda *said: told.append(said))
    for _ in range(2):
        drawn = source.sample(_requests())
        assert [[r.response_ids for r in group] for group in drawn] == [
            [r.response_ids for r in group] for group in whole
        ]
    expected = {12: [12], 3: [12, 6, 3], 1: [12, 6, 3, 1]}[fit]  # kept for the second call
    assert [now for now, _, _ in told] == expected
    assert told[0][1:] == (512, "CUDA out of memory. Tried to allocate 1 GiB")


def test_a_row_that_does_not_fit_alone_is_an_error(rows_that_fit: Callable[[int], None]) -> None:
    model = tiny_model("student", 0)
    model.set_attn_implementation("headwater")
    rows_that_fit(0)
    with pytest.raises(StageError, match=r"a single response.*while it is sampled.*lower sampling"):
        InProcessSampler(model, SamplerSettings(1.0, 12, (2,), 60)).sample(_requests())
