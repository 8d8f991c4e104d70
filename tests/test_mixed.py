"""Rewards mixed with a teacher's: the two ends are grpo and opd, and between is their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater import api
from headwater.config.distillation import MixedKL, SampledToken
from headwater.config.loading import load_recipe, validate_recipe, write_resolved
from headwater.config.reward_weight import LambdaSchedule
from headwater.config.stages import GRPOStage, KLPenalty, MixedStage, OPDStage, Sampling
from headwater.errors import InputError
from headwater.report.curves import learning_curves
from headwater.workflow.graph import StageNode
from headwater.workflow.prepare import prepare_study
from headwater.workflow.stage_work import work_of
from stage_jobs import Run, make_job, make_model
from test_config import plain
from test_estimate import recipe

STREAM = "one stream for all, so that all draw alike"
SMALL: dict[str, Any] = {"steps": 2, "prompts_per_step": 5, "group_size": 4, "lr": 1e-3}
ONE_STEP: dict[str, Any] = SMALL | {"grad_clip": 1e6}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=60)


REWARDS = """
def varied(completions, **columns):
    return [len(set(text)) / 8 for text in completions]

def same(completions, **columns):
    return [1.0 for _ in completions]
"""


class Stages:
    """Runs of one student, each in a folder of its own."""

    def __init__(self, folder: Path, student: Path, teacher: Path) -> None:
        self.folder, self.student, self.teacher = folder, student, teacher
        self.rewards = folder / "rewards.py"
        self.rewards.write_text(REWARDS)

    def run(self, config: Any, rewards: str = "varied") -> Run:
        name = f"{len(list(self.folder.iterdir()))}"
        (self.folder / name).mkdir()
        reads = {} if config.kind == "grpo" else {"teacher_dir": self.teacher}
        job = make_job(
            config.kind,
            config,
            self.folder / name,
            model_dir=self.student,
            fingerprint="same",
            stream=STREAM,
            **reads,
        )
        verifier = f"reward:{self.rewards}:{rewards}"
        return Run(job, labels=config.kind != "opd", verifier=verifier)

    def gradient(self, config: Any, rewards: str = "varied") -> dict[str, torch.Tensor]:
        """A tenth of the first step's gradient: the optimiser's first moments after it."""
        run = self.run(config, rewards).interrupted_at(1)
        (state,) = (run.job.checkpoint_dir / "steps").glob("*/tensors.safetensors")
        return {k: v for k, v in load_file(state).items() if k.startswith("exp_avg/")}


@pytest.fixture
def stages(tmp_path: Path, student: Path, teacher: Path) -> Stages:
    return Stages(tmp_path, student, teacher)


def _without_lambda(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "lambda"} for row in run.metrics()]


def _same_weights(one: Run, other: Run) -> bool:
    ours, theirs = (load_file(run.model_dir / "model.safetensors") for run in (one, other))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl": KLPenalty(coefficient=0.1), "updates_per_batch": 2},
        {"advantage": "group_mean", "sampling": Sampling(temperature=1.3, max_new_tokens=10)},
    ],
    ids=["plain", "reference", "temperature"],
)
def test_lambda_1_is_grpo_to_the_bit(stages: Stages, settings: dict[str, Any]) -> None:
    expected = stages.run(GRPOStage(**SMALL, **settings)).start()
    found = stages.run(MixedStage(**SMALL, **settings, lambda_=1.0)).start()
    assert _same_weights(found, expected)
    assert _without_lambda(found) == expected.metrics()
    assert found.spent() == expected.spent()
    assert found.rollouts() == expected.rollouts()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"kl": MixedKL(forward_weight=0.3)}, {"divergence": MixedKL(forward_weight=0.3)}),
        ({"targets": SampledToken()}, {"targets": SampledToken()}),
    ],
    ids=["reverse", "mixed", "sampled"],
)
def test_lambda_0_is_opd_to_the_bit_and_reads_no_label(
    stages: Stages, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    expected = stages.run(OPDStage(**SMALL, **theirs)).start()
    found = stages.run(MixedStage(**SMALL, **ours, lambda_=0.0)).start()
    assert _same_weights(found, expected)
    assert _without_lambda(found) == expected.metrics()
    assert found.spent() == expected.spent()
    assert found.spent()["labels"] == found.spent()["verifier_calls"] == 0
    assert {row["verdict"] for row in found.rollouts()} == {None}


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_between_the_gradient_is_the_weighted_sum(stages: Stages, temperature: float) -> None:
    settings = ONE_STEP | {"sampling": Sampling(temperature=temperature, max_new_tokens=10)}
    sparse = stages.gradient(GRPOStage(**settings))
    dense = stages.gradient(OPDStage(**settings))
    mixed = stages.gradient(MixedStage(**settings, lambda_=0.3, beta=0.5))
    assert mixed.keys() == sparse.keys()
    assert all(float(tensor.abs().max()) > 0 for tensor in sparse.values())
    for name, found in mixed.items():
        expected = 0.3 * sparse[name] + 0.7 * 0.5 * dense[name]
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_groups_with_equal_rewards_keep_the_teachers_gradient(stages: Stages) -> None:
    found = {
        share: stages.run(MixedStage(**SMALL, lambda_=share), "same").start().metrics()
        for share in (0.5, 1.0)
    }
    assert [row["zero_variance_share"] for row in found[0.5]] == [1.0, 1.0]
    assert all(row["grad_norm"] > 0 for row in found[0.5])
    assert all(row["grad_norm"] == 0 for row in found[1.0])
    dense = stages.gradient(OPDStage(**ONE_STEP))
    mixed = stages.gradient(MixedStage(**ONE_STEP, lambda_=0.5), "same")
    for name, tensor in dense.items():
        torch.testing.assert_close(mixed[name], 0.5 * tensor, rtol=1e-4, atol=1e-8, msg=name)


def test_a_schedule_grades_and_asks_only_where_it_has_weight(stages: Stages) -> None:
    settings = SMALL | {"steps": 3}
    run = stages.run(MixedStage(**settings, lambda_={"start": 0.0, "end": 1.0})).start()
    rows, metrics = run.rollouts(), run.metrics()
    assert [row["lambda"] for row in metrics] == [0.0, 0.5, 1.0]
    assert ["pass_rate" in row for row in metrics] == [False, True, True]
    assert ["kl" in row for row in metrics] == [True, True, False]
    assert {row["verdict"] for row in rows if row["step"] == 0} == {None}
    graded = [row for row in rows if row["step"] > 0]
    spent = run.spent()
    assert None not in {row["verdict"] for row in graded}
    assert spent["verifier_calls"] == len(graded) == 2 * 5 * 4
    assert spent["labels"] == len({row["problem_id"] for row in graded})
    assert 0 < spent["teacher_scored_tokens"] < spent["trained_tokens"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"start": 0.2, "end": 0.2}, [0.2] * 5),
        ({"start": 1.0, "end": 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"start": 0.0, "end": 1.0, "over": 2}, [0.0, 0.5, 1.0, 1.0, 1.0]),
        ({"start": 0.0, "end": 0.8, "schedule": "step", "over": 3}, [0.0, 0.0, 0.0, 0.8, 0.8]),
        (
            {"start": 0.0, "end": 1.0, "schedule": "cosine"},
            [0.0, 0.14644660940672627, 0.5, 0.8535533905932737, 1.0],
        ),
    ],
)
def test_schedules(schedule: dict[str, Any], expected: list[float]) -> None:
    found = LambdaSchedule(**schedule)
    assert [found.at(step, 5) for step in range(5)] == pytest.approx(expected)
    assert found.at(0, 1) == schedule["start"] or found.start == found.end


# --- recipes ------------------------------------------------------------------------------------

ARMS = {
    "mixed": {"teacher": [], "student": [{"mixed": {"lambda": 0.3}}]},
    "ramp": {"teacher": [], "student": [{"mixed": {"lambda": {"start": 0.0, "end": 1.0}}}]},
}


def _refusal(arm: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        validate_recipe(plain(arms={"a": arm}, contrasts=[], **changes))
    return str(refused.value)


def test_a_recipe_writes_lambda_as_it_reads_it(tmp_path: Path) -> None:
    recipe = validate_recipe(
        plain(arms=ARMS, contrasts=[], stages={"mixed": {"lambda": 0.1, "steps": 7}})
    )
    (item,) = recipe.arms["ramp"].student or ()
    stage = recipe.stage(item)
    assert isinstance(stage, MixedStage) and stage.steps == 7
    assert (stage.lambda_at(0), stage.lambda_at(6)) == (0.0, 1.0)
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert "lambda:" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda": 1.5}, "lambda.start = 1.5: input should be less than or equal to 1"),
        ({"lambda": "fast"}, "lambda: found 'fast'; expected a weight; write a number from 0 to 1"),
        ({"lambda": {"start": 0.0, "end": 1.0, "schedule": "step"}}, "add over: STEPS"),
        ({"lamda": 0.5}, "did you mean 'lambda'?"),
        ({"targets": "sampled", "divergence": "forward"}, "set divergence: reverse"),
        ({"group_size": 1}, "set group_size >= 2"),
        ({"overlap": True, "importance_cap": None}, "set importance_cap, such as 2.0"),
        ({"pool": "prompts"}, "mixed cannot read pool 'prompts', which has no labels"),
    ],
)
def test_what_a_mixed_stage_refuses(settings: dict[str, Any], message: str) -> None:
    arm = {"teacher": [], "student": [{"mixed": settings}]}
    assert message in _refusal(arm)


def test_a_mixed_stage_needs_a_teacher() -> None:
    assert "mixed needs a teacher" in _refusal({"student": ["mixed"]})


def test_a_mixed_stage_reads_labels_and_a_teacher() -> None:
    stages = {**recipe()["stages"], "mixed": {"steps": 5, "prompts_per_step": 4}}
    study = prepare_study(validate_recipe(recipe(arms=ARMS, stages=stages)))
    nodes: dict[str, StageNode] = {
        plan.arm: study.graph.nodes[plan.endpoint] for plan in study.graph.arms
    }
    for node in nodes.values():
        assert (node.pool, node.teacher is not None) == ("labels", True)
    work = work_of(study, nodes["mixed"])
    assert (work.scored, work.verifier_calls, work.updates) == (True, 5 * 4 * 8, 5)
    assert work_of(study, nodes["ramp"]).verifier_calls == 4 * 4 * 8  # the first step grades none
    (plan,) = [one for one in study.graph.arms if one.arm == "mixed"]
    assert list(plan.probes) == ["start", "mixed"]


@pytest.mark.slow
def test_a_study_of_lambda_from_recipe_to_curves(tmp_path: Path) -> None:
    small = {"steps": 2, "prompts_per_step": 3, "group_size": 2}
    data = recipe(
        arms={"ramp": {"teacher": [], "student": [{"mixed": {"lambda": {"start": 0, "end": 1}}}]}},
        stages={"pretrain": {"steps": 3, "batch_size": 4}, "mixed": small},
        models={
            "teacher": {"source": "tiny:teacher", "prepare": ["pretrain"]},
            "student": {"source": "tiny:student", "prepare": ["pretrain"]},
        },
        evaluation={"attempts": 1, "problems": 4},
        diagnostics={"prompts": 4},
    )
    report = api.run(validate_recipe(data), tmp_path / "run", quiet=True)
    (row,) = (row for row in report.results.rows if row.arm == "ramp")
    assert (row.spent["labels"], row.spent["verifier_calls"]) == (3, 6)  # of the second step
    (curves,) = (
        one for one in learning_curves(report.results, tmp_path / "run") if one.kind == "mixed"
    )
    drawn = {panel.quantity.key: panel for panel in (*curves.leading, *curves.further)}
    assert drawn["kl"].quantity.name == "reverse KL"
    assert drawn["lambda"].lines[0].runs == (((0, 1), (0.0, 1.0)),)
