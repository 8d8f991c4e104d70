"""A stage that was stopped, killed or ran out of budget ends as one that never was."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disk_faults import disk_full
from headwater.config.base import Settings
from headwater.config.compute import Compute
from headwater.config.distillation import ForwardKL, FullVocabulary, MixedKL, SampledToken, TopK
from headwater.config.stages import (
    DynamicSampling,
    GRPOStage,
    KLPenalty,
    MixedStage,
    OPDStage,
    PretrainStage,
    SampleSFTStage,
    SFTStage,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.errors import BudgetExhausted
from headwater.stages.learner import Learner
from stage_jobs import SAMPLING, TASK, Run, make_job, make_model, problems
from torture.faults import flip

STEPS = 3
SCHEDULE: dict[str, Any] = {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1}
ROLLOUT = SCHEDULE | {"steps": STEPS, "prompts_per_step": 4, "group_size": 4}
CACHED = SCHEDULE | {"steps": STEPS, "batch_size": 7}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=20)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Path]:
    """Teacher rollouts, with the whole distribution and with its top."""
    folders = {}
    for targets in (FullVocabulary(), TopK(k=8)):
        config = TeacherRolloutsStage(targets=targets, sampling=SAMPLING)
        folder = tmp_path_factory.mktemp(targets.kind)
        job = make_job("teacher_rollouts", config, folder, teacher_dir=teacher)
        folders[targets.kind] = Run(job).start().job.output_dir
    return folders


@pytest.fixture(scope="module")
def make_run(
    tmp_path_factory: pytest.TempPathFactory,
    student: Path,
    teacher: Path,
    cached: dict[str, Path],
) -> Callable[..., Run]:
    """Makes runs of one stage, each in a folder of its own, with what its kind reads."""

    def make(config: Settings, **options: Any) -> Run:
        kind = str(config.kind)  # type: ignore[attr-defined]
        inputs: dict[str, Any] = {"model_dir": student}
        if kind in ("opd", "mixed"):
            inputs["teacher_dir"] = teacher
        if kind in ("warmup", "sample_sft"):
            inputs["rollouts_dir"] = cached[getattr(config, "targets", FullVocabulary()).kind]
        if kind == "pretrain":
            inputs["options"] = {"train": TASK, "evals": []}
        inputs |= options.pop("job", {})
        job = make_job(kind, config, tmp_path_factory.mktemp(kind), **inputs)
        return Run(job, labels=kind in ("grpo", "mixed", "sft"), **options)

    return make


CONFIGS = {
    "grpo": GRPOStage(**ROLLOUT),
    "grpo-dynamic": GRPOStage(**ROLLOUT, dynamic_sampling=DynamicSampling()),
    "grpo-updates": GRPOStage(**ROLLOUT, updates_per_batch=2),
    "grpo-k2": GRPOStage(**ROLLOUT, kl=KLPenalty(coefficient=0.1, estimator="k2")),
    "grpo-k3": GRPOStage(**ROLLOUT, kl=KLPenalty(coefficient=0.1, estimator="k3")),
    "grpo-exact": GRPOStage(**ROLLOUT, kl=KLPenalty(coefficient=0.1, estimator="exact")),
    "grpo-sequence": GRPOStage(**ROLLOUT, normalization="sequence", advantage="group_mean"),
    "grpo-ahead": GRPOStage(**ROLLOUT, overlap=True),
    "opd-ahead": OPDStage(**ROLLOUT, overlap=True),
    "opd": OPDStage(**ROLLOUT),
    "mixed": MixedStage(**ROLLOUT, lambda_={"start": 0.0, "end": 1.0}, updates_per_batch=2),
    "mixed-ahead": MixedStage(**ROLLOUT, targets=TopK(k=8), overlap=True),
    "opd-forward": OPDStage(**ROLLOUT, kl=ForwardKL()),
    "opd-mixed": OPDStage(**ROLLOUT, kl=MixedKL(forward_weight=0.3), targets=TopK(k=8)),
    "opd-top-k": OPDStage(**ROLLOUT, targets=TopK(k=8)),
    "opd-sampled": OPDStage(**ROLLOUT, targets=SampledToken(), normalization="constant"),
    "warmup": WarmupStage(**CACHED),
    "warmup-top-k": WarmupStage(**CACHED, targets=TopK(k=8)),
    "sft": SFTStage(**CACHED),
    "sample_sft": SampleSFTStage(**CACHED),
    "pretrain": PretrainStage(**CACHED),
}


@pytest.fixture(scope="module")
def straight(make_run: Callable[..., Run]) -> Callable[[str], Run]:
    """The run of a configuration that nothing stops."""
    return functools.cache(lambda name: make_run(CONFIGS[name]).start())


@pytest.mark.parametrize("name", CONFIGS)
def test_stopping_after_every_step_equals_not_stopping(
    name: str, make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    config = CONFIGS[name]
    expected = straight(name)
    assert len(expected.metrics()) == STEPS
    stopped = make_run(config)
    for step in range(1, STEPS + 1):
        stopped.interrupted_at(step)
    stopped.start()
    stopped.assert_equals(expected)
    assert stopped.spent() == expected.spent()
    # A fast stage gathers its charges; what was done once is counted once in any case.
    assert stopped.spent(physical=True)["updates"] == expected.spent()["updates"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopping_once_equals_not_stopping(
    step: int, make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("grpo")
    make_run(CONFIGS["grpo"]).interrupted_at(step).start().assert_equals(expected)


def test_bfloat16_continues_bit_for_bit(make_run: Callable[..., Run]) -> None:
    compute = {"compute": Compute(device="cpu", precision="bfloat16")}
    straight = make_run(CONFIGS["grpo"], job=compute).start()
    stopped = make_run(CONFIGS["grpo"], job=compute).interrupted_at(2)
    stopped.start().assert_equals(straight)


def _killed_after_step(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a checkpoint after every step, and die in the middle of what follows `step`."""

    class Killed(BaseException):
        pass

    record = Learner.record

    def dying_record(self: Learner, at: int, *args: Any, **kwargs: Any) -> None:
        if at == step:
            raise Killed
        record(self, at, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "record", dying_record)
        with pytest.raises(Killed):
            run.start()


@pytest.mark.parametrize("name", ["grpo-dynamic", "opd", "sft", "warmup"])
@pytest.mark.parametrize("checkpoint_seconds", [1e-9, 1e9])
def test_a_killed_stage_redoes_what_was_not_saved_and_counts_it_once(
    name: str,
    checkpoint_seconds: float,
    make_run: Callable[..., Run],
    straight: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIGS[name].model_copy(update={"checkpoint_seconds": checkpoint_seconds})
    expected = straight(name)
    killed = make_run(config)
    _killed_after_step(killed, 1, monkeypatch)
    killed.start().assert_equals(expected)
    if name in ("grpo-dynamic", "opd"):
        again = killed.spent(physical=True)["generated_tokens"]
        assert again > expected.spent()["generated_tokens"]


def test_a_damaged_checkpoint_starts_the_stage_afresh(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("grpo")
    stopped = make_run(CONFIGS["grpo"]).interrupted_at(2)
    (tensors,) = stopped.job.checkpoint_dir.glob("steps/*/tensors.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    stopped.start().assert_equals(expected)
    assert stopped.spent(physical=True)["updates"] == 2 + STEPS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("file", ["metrics.jsonl", "rollouts/*.parquet", "steps/*/state.json"])
def test_a_flipped_bit_beside_a_checkpoint_is_found(
    file: str, seed: int, make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    stopped = make_run(CONFIGS["grpo"]).interrupted_at(2)
    (path,) = stopped.job.checkpoint_dir.glob(file)
    flip(path, random.Random(seed))
    stopped.start().assert_equals(straight("grpo"))
    assert stopped.spent(physical=True)["updates"] == 2 + STEPS  # from the start


def test_a_stage_whose_ledger_was_lost_starts_afresh(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    stopped = make_run(CONFIGS["grpo"]).interrupted_at(2)
    (stopped.job.output_dir.parent / "ledger.sqlite").unlink()
    stopped.start().assert_equals(straight("grpo"))


@pytest.mark.parametrize("below", ["steps", "."])
def test_a_full_disk_at_a_checkpoint_loses_nothing(
    below: str, make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    stopped = make_run(CONFIGS["grpo"]).interrupted_at(1)
    with disk_full(stopped.job.checkpoint_dir / below), pytest.raises(OSError, match="No space"):
        stopped.interrupted_at(2)
    stopped.start().assert_equals(straight("grpo"))


def test_after_publishing_only_the_result_is_needed(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    run = make_run(CONFIGS["grpo"]).interrupted_at(2).start()
    shutil.rmtree(run.job.checkpoint_dir)
    assert len(run.metrics()) == STEPS
    assert {row["step"] for row in run.rollouts()} == set(range(STEPS))
    run.assert_equals(straight("grpo"))


def test_a_run_cut_off_while_publishing_publishes_again(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("grpo")
    run = make_run(CONFIGS["grpo"]).interrupted_at(3).start()
    (run.model_dir / "model.safetensors").write_bytes(b"half")
    run.start().assert_equals(expected)


# --- budgets ------------------------------------------------------------------------------------


def _exhausted(run: Run) -> dict[str, float]:
    with pytest.raises(BudgetExhausted, match=r"raise budget\."):
        run.start()
    return run.spent()


@pytest.mark.parametrize("name", ["grpo", "grpo-dynamic", "grpo-updates", "opd", "sft", "warmup"])
def test_a_budget_of_updates_stops_at_the_number_and_goes_on_when_raised(
    name: str, make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight(name)
    limited = make_run(CONFIGS[name], limits={"updates": 2})
    assert _exhausted(limited)["updates"] == 2
    assert _exhausted(limited)["updates"] == 2  # and again, without a larger budget
    limited.limits = {"updates": 100}
    limited.start().assert_equals(expected)
    assert limited.spent(physical=True)["updates"] == expected.spent()["updates"]


def test_updates_of_one_batch_are_not_torn(make_run: Callable[..., Run]) -> None:
    limited = make_run(CONFIGS["grpo-updates"], limits={"updates": 5})
    assert _exhausted(limited)["updates"] == 4


@pytest.mark.parametrize("name", ["grpo-dynamic", "grpo-updates"])
@pytest.mark.parametrize(
    ("counter", "limit"),
    [("verifier_calls", 23), ("verifier_calls", 16), ("labels", 6), ("generated_tokens", 150)],
)
def test_a_budget_that_ends_inside_a_step_undoes_that_step(
    name: str,
    counter: str,
    limit: int,
    make_run: Callable[..., Run],
    straight: Callable[[str], Run],
) -> None:
    expected = straight(name)
    limited = make_run(CONFIGS[name], limits={counter: limit})
    spent = _exhausted(limited)
    if counter == "generated_tokens":  # the batch that would pass it does not count
        assert spent[counter] <= limit < limited.spent(physical=True)[counter]
    else:
        assert spent[counter] == limit
    limited.limits = {counter: 10_000}
    limited.start().assert_equals(expected)


def test_sft_stops_at_its_budget_of_labels(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("sft")
    limited = make_run(CONFIGS["sft"], limits={"labels": 8})
    assert _exhausted(limited)["labels"] == 8
    limited.limits = {"labels": len(problems())}
    limited.start().assert_equals(expected)


def test_opd_stops_before_a_budget_of_generated_tokens(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("opd")
    whole = expected.spent()["generated_tokens"]
    limited = make_run(CONFIGS["opd"], limits={"generated_tokens": whole - 1})
    assert 0 < _exhausted(limited)["generated_tokens"] < whole
    limited.limits = {"generated_tokens": whole}  # exactly enough
    limited.start().assert_equals(expected)


def test_a_budget_that_is_just_enough_does_not_stop(
    make_run: Callable[..., Run], straight: Callable[[str], Run]
) -> None:
    expected = straight("grpo")
    spent = expected.spent()
    limits = {k: spent[k] for k in ("labels", "verifier_calls", "generated_tokens", "updates")}
    make_run(CONFIGS["grpo"], limits=limits).start().assert_equals(expected)
