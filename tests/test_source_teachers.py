"""Several teachers, each for the problems of its own source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.distillation import Targets, TopK
from headwater.config.loading import load_recipe, validate_recipe, write_resolved
from headwater.config.stages import (
    MixedStage,
    OPDStage,
    SampleSFTStage,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.engine.cached_targets import CachedArtifacts, CachedRollouts
from headwater.errors import InputError
from headwater.models.size import together
from headwater.types import Problem
from headwater.workflow.contrasts import check_contrasts
from headwater.workflow.estimate import model_sizes
from headwater.workflow.graph import StageNode
from headwater.workflow.prepare import prepare_study
from headwater.workflow.run import make_task
from headwater.workflow.store import ArtifactStore
from headwater.workflow.study import Study
from rank_runs import Part, run_on_ranks
from stage_jobs import SAMPLING, Run, make_job, make_model, problems
from test_estimate import recipe

#: Ten problems, of which the odd ones are of another source.
PROBLEMS = tuple(
    replace(problem, source="odd" if place % 2 else "even")
    for place, problem in enumerate(problems().problems)
)
ODD = tuple(problem for problem in PROBLEMS if problem.source == "odd")
EVEN = tuple(problem for problem in PROBLEMS if problem.source == "even")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        "student": ("tiny:student", 40),
        "first": ("tiny:small", 60),
        "second": ("tiny:small", 5),
    }
    return {
        name: make_model(source, tmp_path_factory.mktemp(name), steps=steps)
        for name, (source, steps) in made.items()
    }


def _drawn(folder: Path, teacher: Path, asked: tuple[Problem, ...]) -> Path:
    config = TeacherRolloutsStage(sampling=SAMPLING)
    job = make_job("teacher_rollouts", config, folder, teacher_dir=teacher, problems=asked)
    return Run(job).start().job.output_dir


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Path]:
    """Artifacts of rollouts, each teacher's of its own problems."""
    return {
        "even": _drawn(tmp_path_factory.mktemp("even"), models["first"], EVEN),
        "odd": _drawn(tmp_path_factory.mktemp("odd"), models["second"], ODD),
    }


# --- stages --------------------------------------------------------------------------------------


def test_cached_targets_are_each_teachers_own(drawn: dict[str, Path]) -> None:
    both = CachedArtifacts((drawn["even"], drawn["odd"], drawn["odd"]))
    assert [number for _, _, number in both.examples] == [0] * 5 + [1] * 5
    for name, rows in (("even", [3, 1]), ("odd", [8, 6])):
        alone = CachedRollouts(drawn[name])
        place = (torch.device("cpu"), torch.float32)
        found, expected = both.targets(rows, *place), alone.targets([r % 5 for r in rows], *place)
        assert torch.equal(found.hidden_TH, expected.hidden_TH)  # type: ignore[union-attr]
        assert torch.equal(found.head_VH, expected.head_VH)  # type: ignore[union-attr]


def _moments(run: Run) -> dict[str, torch.Tensor]:
    """A tenth of the first step's gradient."""
    (state,) = (run.interrupted_at(1).job.checkpoint_dir / "steps").glob("*/tensors.safetensors")
    return {k: v for k, v in load_file(state).items() if k.startswith("exp_avg/")}


def _assert_sums(found: dict[str, torch.Tensor], parts: list[dict[str, torch.Tensor]]) -> None:
    for name, tensor in found.items():
        expected = sum((part[name] for part in parts), torch.zeros_like(tensor))
        scale = float(expected.abs().max())
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5 * scale, msg=name)
    assert all(float(part[name].abs().max()) > 0 for part in parts for name in found)


@pytest.mark.parametrize("kind", ["warmup", "sample_sft"])
def test_learning_from_both_caches_is_the_sum(
    tmp_path: Path, models: dict[str, Path], drawn: dict[str, Path], kind: str
) -> None:
    config_of = WarmupStage if kind == "warmup" else SampleSFTStage
    config = config_of(steps=2, batch_size=10, grad_clip=1e6)

    def run(name: str, rollouts: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], int]:
        job = make_job(
            kind, config, tmp_path / name, model_dir=models["student"], rollouts_dir=rollouts,
            **changes,
        )  # fmt: skip
        tokens = sum(len(r) for _, r, _ in CachedArtifacts((rollouts,)).examples)
        return _moments(Run(job)), tokens

    both, _ = run("both", drawn["even"], teachers={"odd": drawn["odd"]})
    (even, of_even), (odd, of_odd) = run("even", drawn["even"]), run("odd", drawn["odd"])
    whole = of_even + of_odd  # token means: each part weighs as many as it has
    weighed = [
        {name: tensor * (tokens / whole) for name, tensor in part.items()}
        for part, tokens in ((even, of_even), (odd, of_odd))
    ]
    _assert_sums(both, weighed)


@pytest.mark.parametrize("targets", [None, TopK(k=4)], ids=["full", "top_k"])
@pytest.mark.parametrize("kind", ["opd", "mixed"])
def test_the_gradient_of_two_teachers_is_the_sum_of_their_parts(
    tmp_path: Path, models: dict[str, Path], kind: str, targets: Targets | None
) -> None:
    settings: dict[str, Any] = {"steps": 2, "group_size": 2, "grad_clip": 1e6}
    settings |= {"normalization": "constant"} | ({"targets": targets} if targets else {})

    def run(name: str, teacher: str, asked: tuple[Problem, ...], **changes: Any) -> Run:
        config: Any = OPDStage(prompts_per_step=len(asked), **settings)
        if kind == "mixed":
            config = MixedStage(prompts_per_step=len(asked), lambda_=0.0, **settings)
        job = make_job(
            kind, config, tmp_path / name, model_dir=models["student"], fingerprint="same",
            stream="same", teacher_dir=models[teacher], problems=asked, **changes,
        )  # fmt: skip
        return Run(job, labels=kind == "mixed")

    both = run("both", "first", PROBLEMS, teachers={"odd": models["second"]})
    found = _moments(both)
    parts = [_moments(run("even", "first", EVEN)), _moments(run("odd", "second", ODD))]
    _assert_sums(found, [{n: 0.5 * t for n, t in part.items()} for part in parts])
    wrong = _moments(run("wrong", "first", PROBLEMS))
    assert any(not torch.allclose(found[n], wrong[n], rtol=1e-2) for n in found)
    scored = both.spent()["teacher_scored_tokens"]
    assert scored == both.spent()["trained_tokens"] > 0


def test_two_ranks_with_teachers_of_their_own_give_the_same(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """One rank has a micro-batch of one teacher while the other has one of the other."""
    config = OPDStage(steps=2, prompts_per_step=5, group_size=2, micro_batch_tokens=1, lr=1e-3)

    def run(name: str) -> Run:
        job = make_job(
            "opd", config, tmp_path / name, model_dir=models["student"], problems=PROBLEMS,
            teacher_dir=models["first"], teachers={"odd": models["second"]},
        )  # fmt: skip
        return Run(job)

    (ours,) = run_on_ranks([Part(run("ours"))], 2, tmp_path / "ranks")
    alone = run("alone").start()
    for found, wanted in zip(ours.metrics(), alone.metrics(), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    ours_spent, wanted_spent = ours.spent(), alone.spent()
    assert ours_spent == pytest.approx(wanted_spent, rel=1e-6)


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"problem": f"{n}+{m}=", "answer": n + m, "source": ("math", "code", "word")[n % 3]}
        for n in range(12)
        for m in range(25)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPERT = {"math": {"model": "expert", "chain": ["grpo"]}}
ROUTE: dict[str, Any] = {"teacher": [], "student": ["warmup", "opd"]}


def _study(train: Path, arm: dict[str, Any], **changes: Any) -> Study:
    values = recipe(**changes)
    values["task"] |= {"train": str(train), "prompt": "boxed"}
    values["models"] = {
        "teacher": {"source": "tiny:teacher"},
        "expert": {"source": "tiny:small"},
        "student": {"source": "tiny:student"},
    }
    values["pools"] = {"labels": 40, "split": [], "prompts": 100}
    values["arms"] = {"cold": {"student": ["grpo"]}, "one": ROUTE, "both": {**ROUTE, **arm}}
    return prepare_study(validate_recipe(values))


def _of(study: Study, arm: str, kind: str) -> list[StageNode]:
    (plan,) = (one for one in study.graph.arms if one.arm == arm)
    nodes = (study.graph.nodes[one] for one in study.graph.arm_stages(plan))
    return [node for node in nodes if node.kind == kind]


def test_each_teacher_draws_for_its_own_problems(train: Path, tmp_path: Path) -> None:
    study = _study(train, {"teachers": EXPERT})
    rollouts = {node.model_name: node for node in _of(study, "both", "teacher_rollouts")}
    assert {name: tuple(node.sources) for name, node in rollouts.items()} == {
        "teacher": ("code", "word"),
        "expert": ("math",),
    }
    asked = {name: study.problems_of(node) for name, node in rollouts.items()}
    pool = study.pools["prompts"]
    assert list(asked["expert"]) == [p for p in pool if p.source == "math"]
    assert {p.id for p in asked["teacher"]} | {p.id for p in asked["expert"]} == {
        p.id for p in pool
    }
    (trained,) = _of(study, "both", "grpo")
    assert trained.model_name == "expert" and rollouts["expert"].teacher == trained.fingerprint
    (warmup,), (opd,) = _of(study, "both", "warmup"), _of(study, "both", "opd")
    assert warmup.rollouts == rollouts["teacher"].fingerprint
    assert warmup.teachers == {"math": rollouts["expert"].fingerprint}
    assert opd.teachers == {"math": trained.fingerprint}
    store = ArtifactStore(tmp_path)
    tasks = [make_task(study, store, node.fingerprint) for node in rollouts.values()]
    assert len({task.problem_set for task in tasks}) == 2
    job = make_task(study, store, opd.fingerprint).job
    assert job.teachers == {"math": store.path(trained.fingerprint).resolve() / "model"}
    job = make_task(study, store, warmup.fingerprint).job
    assert job.teachers == {"math": store.path(rollouts["expert"].fingerprint).resolve()}


def test_all_teachers_labels_are_the_arms(train: Path) -> None:
    study = _study(train, {"teachers": EXPERT})
    assert not _of(study, "one", "grpo") and len(_of(study, "both", "grpo")) == 1
    with pytest.raises(InputError) as caught:
        _study(
            train,
            {"teachers": EXPERT},
            contrasts=[{"better": "both", "than": "one", "differs_in": ["transfer"]}],
        )
    said = str(caught.value)
    assert "teacher of math is 'expert after grpo(labels)' in both and None in one" in said
    assert "labels read" in said
    aspects = ["teacher", "labels"]
    claims = [{"better": "both", "than": "one", "differs_in": aspects}]
    check_contrasts(_study(train, {"teachers": EXPERT}, contrasts=claims))


def test_what_teaches_is_in_the_fingerprint_only_where_given(train: Path) -> None:
    plain = _study(train, {})
    raw = {"math": {"model": "expert"}}
    found = [
        _of(_study(train, {"teachers": teachers}), "both", "opd")[0].fingerprint
        for teachers in ({}, {"math": {"model": "teacher"}}, raw, {"code": raw["math"]})
    ]
    assert found[0] == found[1] == _of(plain, "one", "opd")[0].fingerprint
    assert len(set(found)) == 3
    other = train.parent / "moved" / train.name  # ids come from the name
    other.parent.mkdir()
    other.write_text(train.read_text().replace('"source": "word"', '"source": "math"'))
    moved = [
        _of(_study(other, arm), "both", "opd")[0].fingerprint for arm in ({}, {"teachers": raw})
    ]
    assert moved[0] == found[0] and moved[1] != found[2]


@pytest.mark.parametrize(
    ("arm", "changes", "words"),
    [
        ({"teachers": {"maths": EXPERT["math"]}}, {}, "teachers.maths: no problem of a pool"),
        ({"teachers": {"maths": EXPERT["math"]}}, {}, "did you mean 'math'"),
        ({"teachers": dict.fromkeys(("math", "code", "word"), EXPERT["math"])}, {}, "are all"),
        ({"teachers": EXPERT, "teacher": None, "student": ["grpo"]}, {}, "without a `teacher`"),
        ({"teachers": {"math": {"model": "expret"}}}, {}, "teachers.math.model; did you mean"),
        ({"teachers": {"math": {"chain": ["opd"]}}}, {}, "opd needs a teacher"),
        (
            {"teachers": EXPERT},
            {"compute": {"scoring": {"kind": "vllm"}}, "stages": {"opd": {"targets": "sampled"}}},
            "servers hold one teacher",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_load(
    train: Path, arm: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=r"arms\.both") as caught:
        _study(train, arm, **changes)
    assert words in str(caught.value)


def test_a_resolved_recipe_is_read_back(train: Path, tmp_path: Path) -> None:
    study = _study(train, {"teachers": EXPERT})
    write_resolved(study.recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == study.recipe


def test_memory_is_planned_for_all_teachers(train: Path) -> None:
    sizes = model_sizes(_study(train, {"teachers": EXPERT}).recipe)
    teacher, expert = sizes["teacher"], sizes["expert"]
    assert teacher is not None and expert is not None
    both = together([expert, teacher])
    assert both == replace(teacher, parameters=teacher.parameters + expert.parameters)
    assert together([expert, None]) is None and together([expert]) == expert
