"""Real stages that go wrong: what they say, what they keep, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.config.compute import Compute
from headwater.config.guards import Guards
from headwater.config.stages import GRPOStage, SFTStage
from headwater.engine.checkpoint import load_checkpoint
from headwater.errors import StageError
from headwater.stages import supervised
from headwater.stages.learner import Learner
from stage_jobs import Run, make_job, make_model

#: Two wrong answers to each problem are no signal.
GUARDS = Guards(no_signal_steps=2)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=5)


@pytest.fixture
def make_run(tmp_path: Path, student: Path) -> Callable[..., Run]:
    def make(folder: str, guards: Guards = GUARDS, *, strict: bool = False, **stage: Any) -> Run:
        config = GRPOStage(**{"steps": 4, "prompts_per_step": 2, "group_size": 2} | stage)
        job = make_job("grpo", config, tmp_path / folder, model_dir=student, guards=guards)
        return Run(job, labels=True, strict=strict)

    return make


def test_a_stage_tells_its_alert_once_and_publishes_it(make_run: Callable[..., Run]) -> None:
    run = make_run("one").start()
    (alert,) = run.alerts()
    assert run.told == [alert]
    assert (alert.guard, alert.step) == ("no_signal_share", 2)
    quiet = make_run("quiet", Guards()).start()
    assert (quiet.alerts(), quiet.told) == ((), [])
    quiet.assert_equals(run)  # guards change no number


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_stage_has_the_alerts_of_one_that_never_stopped(
    step: int, make_run: Callable[..., Run]
) -> None:
    straight = make_run("straight").start()
    resumed = make_run("resumed").interrupted_at(step).start()
    assert resumed.alerts() == straight.alerts()
    assert len(resumed.told) == 1  # not again after the stop


def test_strict_ends_a_stage_after_saving_it_and_it_goes_on_without(
    make_run: Callable[..., Run],
) -> None:
    straight = make_run("straight").start()
    run = make_run("strict", strict=True)
    match = r"grpo \(stage .*\): step 2 of 4: .*--strict ends the run here.*without --strict"
    with pytest.raises(StageError, match=match):
        run.start()
    found = load_checkpoint(run.job.checkpoint_dir / "steps")
    assert found is not None and found.state["done"] == 2
    with pytest.raises(StageError, match=match):  # a second time it does not slip through
        run.start()
    run.strict = False
    run.start().assert_equals(straight)
    assert run.alerts() == straight.alerts()


def test_strict_ends_a_stage_that_warns_in_its_last_step(make_run: Callable[..., Run]) -> None:
    run = make_run("last", strict=True, steps=2)
    with pytest.raises(StageError, match="step 2 of 2"):
        run.start()
    assert not (run.job.output_dir / "model").exists()


# --- numbers that are not finite ----------------------------------------------------------------


def _sft(student: Path, folder: Path, lr: float) -> Run:
    config = SFTStage(steps=3, batch_size=4, lr=lr)
    return Run(make_job("sft", config, folder, model_dir=student), labels=True)


def test_a_learning_rate_that_breaks_the_weights_is_named_and_nothing_is_published(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Learner.record

    def record_and_save(self: Learner, *args: Any, **kwargs: Any) -> None:
        saved(self, *args, **kwargs)
        self.save()

    monkeypatch.setattr(Learner, "record", record_and_save)
    run = _sft(student, tmp_path / "high", 1e38)
    match = (
        r"sft \(stage sft-0123456789\), step 2 of 3: update 1: loss=nan.*not finite in \d+ of \d+ "
        r"gradients: model\.embed_tokens\.weight, .* and \d+ more\), expected finite.*lower lr.*"
        r"Weights are unchanged"
    )
    with pytest.raises(StageError, match=match):
        run.start()
    found = load_checkpoint(run.job.checkpoint_dir / "steps")
    assert found is not None and found.state["done"] == 1  # that of the step before
    assert not (run.job.output_dir / "model").exists()
    lower = _sft(student, tmp_path / "lower", 1e-4).start()
    assert len(lower.metrics()) == 3


def test_a_gradient_that_is_not_finite_names_its_parameter(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite: one layer's norm alone gets an infinite gradient."""
    real = supervised.hidden_at_targets

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        norm = model.get_decoder().norm.weight
        zero = norm[0] * 0.0
        zero.register_hook(lambda gradient: gradient * torch.inf)
        hidden: torch.Tensor = real(model, batch)
        return hidden + torch.sqrt(zero * zero + 1.0) - 1.0 + zero

    monkeypatch.setattr(supervised, "hidden_at_targets", poisoned)
    run = _sft(student, tmp_path, 1e-4)
    match = r"step 1 of 3: update 0: loss=\d.*not finite in 1 of \d+ .*: model\.norm\.weight\)"
    with pytest.raises(StageError, match=match):
        run.start()


# --- determinism --------------------------------------------------------------------------------


def test_deterministic_algorithms_change_nothing_on_a_cpu(
    make_run: Callable[..., Run], tmp_path: Path, student: Path
) -> None:
    plain = make_run("plain").start()
    assert not torch.are_deterministic_algorithms_enabled()
    job = make_job(
        "grpo",
        plain.job.config,
        tmp_path / "deterministic",
        model_dir=student,
        compute=Compute(device="cpu", precision="float32", deterministic=True),
        guards=GUARDS,
    )
    try:
        run = Run(job, labels=True).start()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    run.assert_equals(plain)
