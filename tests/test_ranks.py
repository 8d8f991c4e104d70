"""One rank, two and four: the same gradients, metrics, artifacts and spending."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.compute import Compute
from headwater.config.distillation import SampledToken, TopK
from headwater.config.evaluation import Evaluation
from headwater.config.recipe import Diagnostics
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
from headwater.engine.checkpoint import load_checkpoint
from headwater.models.loading import load_model, load_tokenizer
from headwater.models.saving import build_from_state, save_model
from headwater.stages.job import StageJob
from rank_runs import Part, run_on_ranks
from stage_jobs import SAMPLING, TASK, TIMES, Run, make_job, make_model

SCHEDULE: dict[str, Any] = {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1}
# three prompts: of four ranks one has nothing to train on, of two each a different number
ROLLOUT = SCHEDULE | {"steps": 2, "prompts_per_step": 3, "group_size": 4}
CACHED = SCHEDULE | {"steps": 2, "batch_size": 7}
#: With which some groups of every step have a reward signal: a KL penalty alone, of a policy that
#: is still its reference, has a gradient of nothing but rounding.
SEED = 6
#: Stages that are done again rather than continued.
UNSTOPPED = ("teacher_rollouts", "probe")
#: Small micro-batches, so that ranks have several, and not equally many.
SMALL = {"micro_batch_tokens": 40}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=150)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=80)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    config = TeacherRolloutsStage(sampling=SAMPLING, prompts_per_batch=4)
    folder = tmp_path_factory.mktemp("cached")
    return (
        Run(make_job("teacher_rollouts", config, folder, teacher_dir=teacher))
        .start()
        .job.output_dir
    )


Runs = Callable[[Path], dict[str, Run]]


@pytest.fixture(scope="module")
def runs(student: Path, teacher: Path, cached: Path) -> Runs:
    """Every kind of stage, anew in a folder."""

    def made(folder: Path) -> dict[str, Run]:
        def job(name: str, config: Any, labels: bool = False, **changes: Any) -> Run:
            changes = {"model_dir": student, "seed": SEED} | changes
            return Run(make_job(config.kind, config, folder / name, **changes), labels)

        def unkinded(kind: str, config: Any, labels: bool = False, **changes: Any) -> Run:
            return Run(make_job(kind, config, folder / kind, **changes), labels)

        exact = KLPenalty(coefficient=0.05, estimator="exact")
        k3 = KLPenalty(coefficient=0.05)
        return {
            "pretrain": job(
                "pretrain",
                PretrainStage(**CACHED, worked=0.5, careless=0.0, guessed=0.5),
                options={"train": TASK, "evals": []},
            ),
            "sft": job("sft", SFTStage(**CACHED, **SMALL), labels=True),
            "grpo": job("grpo", GRPOStage(**ROLLOUT, **SMALL), labels=True),
            "grpo_k3": job(
                "grpo_k3", GRPOStage(**ROLLOUT, **SMALL, kl=k3, updates_per_batch=2), labels=True
            ),
            "grpo_ahead": job("grpo_ahead", GRPOStage(**ROLLOUT, overlap=True), labels=True),
            "grpo_exact": job(
                "grpo_exact",
                GRPOStage(**ROLLOUT, kl=exact, dynamic_sampling=DynamicSampling()),
                labels=True,
            ),
            "warmup": job("warmup", WarmupStage(**CACHED, **SMALL), rollouts_dir=cached),
            "sample_sft": job("sample_sft", SampleSFTStage(**CACHED), rollouts_dir=cached),
            "opd": job("opd", OPDStage(**ROLLOUT, **SMALL), teacher_dir=teacher),
            "opd_top_k": job(
                "opd_top_k", OPDStage(**ROLLOUT, targets=TopK(k=8)), teacher_dir=teacher
            ),
            "opd_sampled": job(
                "opd_sampled", OPDStage(**ROLLOUT, targets=SampledToken()), teacher_dir=teacher
            ),
            "mixed": job(
                "mixed",
                MixedStage(**ROLLOUT, **SMALL, lambda_={"start": 0.0, "end": 1.0}, kl=k3),
                labels=True,
                teacher_dir=teacher,
            ),
            "opd_recomputed": job(
                "opd_recomputed",
                OPDStage(**ROLLOUT),
                teacher_dir=teacher,
                compute=Compute(device="cpu", precision="float32", activation_checkpointing=True),
            ),
            "teacher_rollouts": job(
                "teacher_rollouts",
                TeacherRolloutsStage(sampling=SAMPLING, prompts_per_batch=4, targets=TopK(k=8)),
                teacher_dir=teacher,
            ),
            "evaluate": unkinded(
                "evaluate",
                Evaluation(attempts=2, batch_prompts=3),
                labels=True,
                model_dir=student,
                options={"verifier": "exact"},
            ),
            "probe": unkinded(
                "probe", Diagnostics(prompts=5), model_dir=student, teacher_dir=teacher
            ),
        }

    return made


@pytest.fixture(scope="module")
def alone(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every stage by a process alone; its checkpoint after the first step is left."""
    folder = tmp_path_factory.mktemp("alone")
    started = runs(folder)
    for name, run in started.items():
        if name not in UNSTOPPED:
            run.interrupted_at(1)
            shutil.copytree(run.job.checkpoint_dir, folder / "kept" / name)
        run.start()
        if name not in UNSTOPPED:
            shutil.rmtree(run.job.checkpoint_dir)
            shutil.copytree(folder / "kept" / name, run.job.checkpoint_dir)
    return started


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "then"), [(1, 4), (2, None), (4, 2)])
def test_every_stage_gives_the_same_on_any_number_of_ranks(
    ranks: int, then: int | None, runs: Runs, alone: dict[str, Run], tmp_path: Path
) -> None:
    """Gradients after one step on `ranks`, all else once `then` as many went on (None: one
    process without a group)."""
    made = runs(tmp_path / "runs")
    stop_at = {name: None if name in UNSTOPPED else 1 for name in made}
    parts = [Part(run, stop_at[name]) for name, run in made.items()]
    run_on_ranks(parts, ranks, tmp_path / "first")
    for name, run in made.items():
        if stop_at[name] and name not in ("evaluate", "grpo_k3"):  # nothing, or two updates
            _assert_same_gradient(run, alone[name], name)
    rest = [run for name, run in made.items() if stop_at[name]]
    if then is None:
        for run in rest:
            run.start()
    else:
        run_on_ranks([Part(run) for run in rest], then, tmp_path / "then")
    for name, run in made.items():
        _assert_alike(run, alone[name], name)


@pytest.mark.slow
def test_two_ranks_in_bfloat16_and_with_a_head_of_its_own(student: Path, tmp_path: Path) -> None:
    """In bfloat16 the gradient of a step, whose sums are float32; with a head that is not the
    embedding, everything."""
    untied = _untied(student, tmp_path / "untied")
    narrow = Compute(device="cpu", precision="bfloat16")

    def made(folder: Path) -> list[Run]:
        def job(name: str, config: Any, **changes: Any) -> Run:
            changes = {"model_dir": untied, "seed": SEED} | changes
            return Run(make_job(config.kind, config, folder / name, **changes), labels=True)

        return [
            job("opd", OPDStage(**ROLLOUT, **SMALL), teacher_dir=student),
            job("narrow", SFTStage(**CACHED, **SMALL), compute=narrow),
            job("tied", SFTStage(**CACHED, **SMALL), compute=narrow, model_dir=student),
        ]

    stop_at = [None, 1, 1]
    wanted = made(tmp_path / "alone")
    wanted[0].start()
    for run in wanted[1:]:
        run.interrupted_at(1)
    parts = [Part(*both) for both in zip(made(tmp_path / "runs"), stop_at, strict=True)]
    ours = run_on_ranks(parts, 2, tmp_path / "first")
    _assert_alike(ours[0], wanted[0], "opd")
    for run, want in zip(ours[1:], wanted[1:], strict=True):
        found, moments = _moments(run.job), _moments(want.job)
        for key, moment in moments.items():
            off = (found[key] - moment).norm() / moment.norm()
            assert off <= 0.1, (run.job.output_dir, key, float(off))


def _untied(model_dir: Path, folder: Path) -> Path:
    """The same model with a head of its own, which is not the embedding."""
    model = load_model(model_dir, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= 1.25
    untied = build_from_state(type(model), config, state, model.generation_config)
    save_model(untied, load_tokenizer(model_dir), folder)
    assert load_file(folder / "model.safetensors").keys() == state.keys()
    return folder


def _assert_same_gradient(ours: Run, theirs: Run, name: str) -> None:
    """By the first moment of the optimiser, a tenth of the gradient after one step."""
    found, wanted = _moments(ours.job), _moments(theirs.job)
    for key, moment in wanted.items():
        off = (found[key].double() - moment.double()).abs().max()
        assert moment.abs().max() > 0, (name, key)
        assert off <= 1e-5 * moment.abs().max(), (name, key, float(off))


def _moments(job: StageJob) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(job.checkpoint_dir / "steps")
    assert checkpoint is not None and checkpoint.state["done"] == 1
    names = {
        f"exp_avg/{name}": torch.zeros_like(tensor)
        for name, tensor in load_file(job.model_dir / "model.safetensors").items()
    }
    checkpoint.read(names)
    return names


def _assert_alike(ours: Run, theirs: Run, name: str) -> None:
    """The same spending and rollouts; metrics and weights within what Adam makes of rounding."""
    assert ours.spent() == theirs.spent(), name
    out, expected = ours.job.output_dir, theirs.job.output_dir
    if (expected / "metrics.jsonl").exists():
        rows, wanted = ours.metrics(), theirs.metrics()
        assert [row.keys() for row in rows] == [row.keys() for row in wanted], name
        for row, want in zip(rows, wanted, strict=True):
            for key, value in want.items():
                assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-5), (name, key)
    assert [_facts(row) for row in ours.rollouts()] == [_facts(row) for row in theirs.rollouts()]
    for path in sorted(expected.rglob("*.safetensors")):
        tensors, wanted_tensors = load_file(out / path.relative_to(expected)), load_file(path)
        assert tensors.keys() == wanted_tensors.keys(), name
        for key, tensor in wanted_tensors.items():
            # of all elements together: Adam makes whole steps of gradients that are but rounding
            off = (tensors[key].double() - tensor.double()).norm()
            assert off <= 2e-4 * tensor.double().norm(), (name, key, float(off))
    for path in expected.glob("*.json"):
        found, wanted_json = (json.loads((f / path.name).read_text()) for f in (out, expected))
        if path.name == "probe.json":
            for key, value in wanted_json.items():
                if key != "positions":
                    assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        else:
            assert found == wanted_json, name


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}
