"""Rollouts drawn one step ahead: from which weights, and corrected for how old they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from headwater.config.distillation import SampledToken
from headwater.config.stages import DynamicSampling, GRPOStage, OPDStage
from headwater.engine.checkpoint import load_checkpoint
from headwater.errors import BudgetExhausted
from stage_jobs import Run, make_job, make_model

ROLLOUT: dict[str, Any] = {"steps": 3, "prompts_per_step": 3, "group_size": 4, "lr": 0.02}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=60)


def _run(config: OPDStage, folder: Path, model: Path) -> Run:
    return Run(make_job("opd", config, folder, model_dir=model, teacher_dir=model, seed=6)).start()


def _responses(run: Run, step: int) -> list[str]:
    return [row["response"] for row in run.rollouts() if row["step"] == step]


def test_each_step_trains_on_rollouts_of_the_weights_before(tmp_path: Path, model: Path) -> None:
    """Forward KL to a teacher at another temperature moves the student from the first step on."""
    moves = ROLLOUT | {"teacher_temperature": 3.0}
    ahead = _run(OPDStage(**moves, overlap=True), tmp_path / "ahead", model)
    on_policy = _run(OPDStage(**moves), tmp_path / "on", model)
    still = _run(OPDStage(**moves | {"lr": 1e-12}), tmp_path / "still", model)
    assert _responses(ahead, 0) == _responses(on_policy, 0) == _responses(still, 0)
    assert _responses(ahead, 1) == _responses(still, 1), "drawn before the first update"
    assert _responses(on_policy, 1) != _responses(still, 1), "that update shows"
    assert _responses(ahead, 2) != _responses(still, 2), "drawn after the first update"
    lags = [row["policy_lag"] for row in ahead.metrics()]
    assert lags == [0.0, 1.0, 1.0]
    gaps = [row["sampler_gap"] for row in ahead.metrics()]
    assert gaps[0] < 1e-5 < 1e-2 < min(gaps[1:]), "the old weights' log-probabilities are kept"
    assert max(row["sampler_gap"] for row in on_policy.metrics()) < 1e-5
    assert "policy_lag" not in on_policy.metrics()[0]


def test_importance_weights_are_of_the_old_weights(tmp_path: Path, model: Path) -> None:
    moves = ROLLOUT | {"teacher_temperature": 3.0, "targets": SampledToken()}
    ahead = _run(OPDStage(**moves, overlap=True), tmp_path, model)
    weights = [row["importance_weight"] for row in ahead.metrics()]
    assert weights[0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(weight - 1.0) > 1e-3 for weight in weights[1:])


def test_what_is_kept_ahead_is_vouched_for(tmp_path: Path, model: Path) -> None:
    """A damaged file of rollouts to come makes the checkpoint beside it worthless, not wrong."""
    config = OPDStage(**ROLLOUT, overlap=True)
    straight = _run(config, tmp_path / "straight", model)
    job = make_job("opd", config, tmp_path / "b", model_dir=model, teacher_dir=model, seed=6)
    stopped = Run(job).interrupted_at(1)
    (kept,) = job.checkpoint_dir.glob("ahead-*.parquet")
    kept.write_bytes(kept.read_bytes()[:-9])
    stopped.start()
    assert stopped.metrics() == straight.metrics()
    assert [row["step"] for row in stopped.progress].count(1) == 2, "begun anew"
    shutil.rmtree(job.checkpoint_dir)


def test_a_step_that_a_budget_ended_is_done_with_its_own_rollouts(
    tmp_path: Path, model: Path
) -> None:
    config = OPDStage(**ROLLOUT | {"teacher_temperature": 3.0}, overlap=True)
    straight = _run(config, tmp_path / "straight", model)
    drawn = [row["response_tokens"] * 12 for row in straight.metrics()]
    limit = {"generated_tokens": round(drawn[0] + drawn[1]) - 1.0}
    job = make_job("opd", config, tmp_path / "b", model_dir=model, teacher_dir=model, seed=6)
    with pytest.raises(BudgetExhausted):
        Run(job, limits=limit).start()
    assert load_checkpoint(job.checkpoint_dir / "steps").state["done"] == 1  # type: ignore[union-attr]
    resumed = Run(job).start()
    assert resumed.metrics() == straight.metrics()
    assert resumed.rollouts() == straight.rollouts()


def test_no_more_is_kept_than_two_checkpoints_need(tmp_path: Path, model: Path) -> None:
    config = OPDStage(**ROLLOUT | {"steps": 5}, overlap=True)
    job = make_job("opd", config, tmp_path, model_dir=model, teacher_dir=model, seed=6)
    for step in range(1, 5):
        Run(job).interrupted_at(step)
        names = sorted(path.name for path in job.checkpoint_dir.glob("ahead-*"))
        assert names[-1] == f"ahead-{step:09d}.parquet" and len(names) == min(step, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"importance_cap": None}, "set importance_cap"),
        ({"dynamic_sampling": DynamicSampling()}, "dynamic_sampling waits for; remove one"),
    ],
)
def test_what_overlap_cannot_be_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GRPOStage(overlap=True, **changes)
