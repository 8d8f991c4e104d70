"""Every stage kind in small: what it writes, what it counts, and what it may not see."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.config.compute import Compute
from headwater.config.distillation import ForwardKL, FullVocabulary, SampledToken, TopK
from headwater.config.evaluation import Evaluation
from headwater.config.recipe import ModelSpec
from headwater.config.stages import (
    DynamicSampling,
    GRPOStage,
    KLPenalty,
    OPDStage,
    PretrainStage,
    SampleSFTStage,
    SFTStage,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.engine.cached_targets import CachedRollouts
from headwater.engine.packing import PackedGroup, pack
from headwater.errors import InputError, StageError
from headwater.rollout.scoring import FrozenModel
from headwater.stages import (
    grpo,
    mixed,
    opd,
    pretrain,
    sample_sft,
    sft,
    teacher_rollouts,
    teacher_term,
    warmup,
)
from headwater.stages.rollouts import RolloutSource
from headwater.tasks.problems import load_problems
from headwater.tasks.prompts import encode_prompt
from headwater.types import FullTargets, Problem, TopKTargets
from stage_jobs import SAMPLING, Run, make_job, make_model, problems

VOCAB = 64


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=80)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Run]:
    """Teacher rollouts with each kind of targets: the same samples."""
    runs = {}
    for name, targets in (("full", FullVocabulary()), ("top_k", TopK(k=VOCAB)), ("none", None)):
        config = TeacherRolloutsStage(
            rollouts_per_prompt=2, targets=targets, sampling=SAMPLING, prompts_per_batch=4
        )
        job = make_job(
            "teacher_rollouts", config, tmp_path_factory.mktemp(name), teacher_dir=teacher
        )
        runs[name] = Run(job).start()
    return runs


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in _weights(folder).values())


def _changed(before: Path, after: Path) -> bool:
    old, new = _weights(before), _weights(after)
    assert old.keys() == new.keys()
    return any(not torch.equal(old[name], new[name]) for name in old)


def _prompt_tokens(student: Path, problem_ids: Iterable[str]) -> int:
    """Prompt tokens of problems, each counted as often as it is given."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    by_id = {problem.id: problem for problem in problems().problems}
    return sum(len(encode_prompt(tokenizer, by_id[i], "bare")) for i in problem_ids)


def _groups(rows: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _body_tokens(student: Path, groups: list[list[dict[str, Any]]]) -> int:
    """Tokens a forward computes: each prompt once, completions but for their last token."""
    responses = sum(row["response_tokens"] - 1 for group in groups for row in group)
    return responses + _prompt_tokens(student, (group[0]["problem_id"] for group in groups))


def _assert_model(folder: Path) -> None:
    """transformers alone loads it, every weight float32, and it answers a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = encode_prompt(tokenizer, Problem("p", "1+1=?", "test"), "bare")
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    assert sorted(path.name for path in folder.parent.iterdir()) in (
        ["metrics.jsonl", "model"],
        ["metrics.jsonl", "model", "rollouts.parquet"],
    )


# --- supervised ---------------------------------------------------------------------------------


def test_source_writes_the_model_it_names(tmp_path: Path) -> None:
    job = make_job("source", ModelSpec(source="tiny:student"), tmp_path)
    run = Run(job).start()
    AutoModelForCausalLM.from_pretrained(run.model_dir)
    other = Run(make_job("source", ModelSpec(source="tiny:student"), tmp_path / "b", seed=2))
    assert _changed(run.model_dir, other.start().model_dir)


def test_pretrain_teaches_the_form_and_counts_its_updates(student: Path) -> None:
    run = Run(make_job("pretrain", PretrainStage(steps=40), student.parents[1], model_dir=student))
    _assert_model(run.model_dir)
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(40))
    assert rows[-1]["nll"] < 1.2 < 4.0 < rows[0]["nll"]
    spent = run.spent()
    assert (spent["updates"], spent["labels"], spent["generated_tokens"]) == (40, 0, 0)
    assert spent["flops"] == 6.0 * _parameters(student) * spent["trained_tokens"]


def test_pretrain_never_trains_on_a_problem_of_the_study(tmp_path: Path, student: Path) -> None:
    """With every sum but one held out, that one is all there is to train on."""
    held_out = "task:arithmetic?steps=1&count=15&modulus=2&operations=+"
    config = PretrainStage(
        steps=1, batch_size=8, worked=1.0, careless=0.0, guessed=0.0, lr=1e-3, warmup_steps=0
    )
    job = make_job(
        "pretrain",
        config,
        tmp_path,
        model_dir=student,
        options={"train": held_out, "evals": []},
    )
    run = Run(job).start()
    assert run.spent()["trained_tokens"] % 8 == 0  # eight times the same example
    (prompt,) = {f"{start}+{operand}=?" for start in range(2) for operand in range(2, 10)} - {
        problem.prompt for problem in load_problems(held_out).problems
    }
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokens = encode_prompt(tokenizer, Problem("p", prompt, "test"), "bare")
    work = tokenizer.encode(prompt.replace("?", "0") + "\n\\boxed{0}")
    assert run.spent()["trained_tokens"] == 8 * (len(tokens) + len(work))


def test_pretrain_says_when_the_study_leaves_nothing_to_train_on(
    tmp_path: Path, student: Path
) -> None:
    every = "task:arithmetic?steps=1&count=16&modulus=2&operations=+"
    options = {"train": every, "evals": []}
    config = PretrainStage(steps=1, batch_size=8, warmup_steps=0)
    job = make_job("pretrain", config, tmp_path, model_dir=student, options=options)
    with pytest.raises(InputError, match=r"among the study's 16; .* lower count"):
        Run(job).start()


def test_sft_reads_each_solution_once_and_no_verdict(tmp_path: Path, student: Path) -> None:
    config = SFTStage(batch_size=4, epochs=2, lr=1e-3)
    run = Run(make_job("sft", config, tmp_path, model_dir=student), labels=True).start()
    _assert_model(run.model_dir)
    assert _changed(student, run.model_dir)
    assert len(run.metrics()) == 6  # ten problems: batches of 4, 4 and 2, twice
    tokenizer = AutoTokenizer.from_pretrained(student)
    answers = sum(
        len(tokenizer.encode(label.solution, add_special_tokens=False))
        for label in problems().labels
    )  # the end token is predicted only
    tokens = 2 * (answers + _prompt_tokens(student, (p.id for p in problems().problems)))
    assert run.spent() == {
        "labels": 10,
        "verifier_calls": 0,
        "prompts": 0,
        "generated_tokens": 0,
        "teacher_scored_tokens": 0,
        "trained_tokens": tokens,
        "updates": 6,
        "flops": 6.0 * _parameters(student) * tokens,
    }
    assert run.rollouts() == []


def test_sft_charges_only_the_labels_its_steps_need(tmp_path: Path, student: Path) -> None:
    config = SFTStage(batch_size=4, steps=2)
    run = Run(make_job("sft", config, tmp_path, model_dir=student), labels=True).start()
    assert run.spent()["labels"] == 8


# --- teacher rollouts, warmup, sample SFT -------------------------------------------------------


def test_teacher_rollouts_keep_the_teachers_distributions(
    cached: dict[str, Run], teacher: Path
) -> None:
    rows = cached["full"].rollouts()
    assert [row["problem_id"] for row in rows[::2]] == [p.id for p in problems().problems]
    for name in ("top_k", "none"):
        texts = [row["response_ids"] for row in cached[name].rollouts()]
        assert texts == [row["response_ids"] for row in rows]
    full = CachedRollouts(cached["full"].job.output_dir)
    top = CachedRollouts(cached["top_k"].job.output_dir)
    frozen = FrozenModel.load(teacher, torch.device("cpu"), torch.float32, VOCAB)
    for row in (0, 7, 9, 19):
        prompt, response = full.examples[row]
        batch = pack([PackedGroup(prompt, (response,), (0,))], dtype=torch.float32, device="cpu")
        theirs = frozen.targets(batch)
        expected = torch.log_softmax(theirs.hidden_TH @ theirs.head_VH.T, -1)
        found = full.targets([row], torch.device("cpu"), torch.float32)
        assert isinstance(found, FullTargets)
        logprobs = torch.log_softmax(found.hidden_TH @ found.head_VH.T, -1)
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
        kept = top.targets([row], torch.device("cpu"), torch.float32)
        assert isinstance(kept, TopKTargets)
        torch.testing.assert_close(
            torch.zeros_like(expected).scatter(-1, kept.ids_TK, kept.logprobs_TK),
            expected,
            rtol=1e-4,
            atol=1e-4,
        )


def test_teacher_rollouts_count_samples_and_scored_tokens(
    cached: dict[str, Run], teacher: Path
) -> None:
    rows = cached["full"].rollouts()
    generated = sum(row["response_tokens"] for row in rows)
    scored = _body_tokens(teacher, _groups(rows, 2))
    spent = cached["full"].spent()
    assert spent == {
        "labels": 0,
        "verifier_calls": 0,
        "prompts": 10,
        "generated_tokens": generated,
        "teacher_scored_tokens": scored,
        "trained_tokens": 0,
        "updates": 0,
        "flops": 2.0 * _parameters(teacher) * (generated + scored),
    }
    assert cached["none"].spent()["teacher_scored_tokens"] == 0
    with pytest.raises(StageError, match=r"20 rollouts but distributions of 0; delete"):
        folder = cached["none"].job.output_dir
        CachedRollouts(folder).targets([0], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", ["warmup", "sample_sft"])
def test_cached_rollouts_teach_without_a_vault(
    kind: str, tmp_path: Path, student: Path, cached: dict[str, Run]
) -> None:
    stage = {"warmup": WarmupStage, "sample_sft": SampleSFTStage}[kind]
    config = stage(batch_size=8, epochs=2, lr=1e-3)
    rollouts = cached["full" if kind == "warmup" else "none"]
    job = make_job(kind, config, tmp_path, model_dir=student, rollouts_dir=rollouts.job.output_dir)
    run = Run(job).start()
    _assert_model(run.model_dir)
    assert _changed(student, run.model_dir)
    signal = "kl" if kind == "warmup" else "nll"
    values = [row[signal] for row in run.metrics()]
    assert len(values) == 6 and sum(values[3:]) < sum(values[:3])
    tokens = 2 * _body_tokens(student, _groups(rollouts.rollouts(), 1))
    spent = run.spent()
    assert (spent["updates"], spent["trained_tokens"], spent["labels"]) == (6, tokens, 0)
    assert spent["generated_tokens"] == spent["teacher_scored_tokens"] == 0


def test_warmup_on_the_whole_top_k_equals_the_full_distribution(
    tmp_path: Path, student: Path, cached: dict[str, Run]
) -> None:
    metrics = []
    for name, targets in (("full", FullVocabulary()), ("top_k", TopK(k=VOCAB))):
        job = make_job(
            "warmup",
            WarmupStage(steps=1, batch_size=8, targets=targets, grad_clip=1e6),
            tmp_path / name,
            model_dir=student,
            rollouts_dir=cached[name].job.output_dir,
        )
        metrics.append(Run(job).start().metrics()[0])
    assert metrics[1]["kl"] == pytest.approx(metrics[0]["kl"], rel=1e-4)
    assert metrics[1]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=1e-4)


# --- OPD ----------------------------------------------------------------------------------------


def _opd(folder: Path, student: Path, teacher: Path, **settings: Any) -> Run:
    values = {"steps": 2, "prompts_per_step": 4, "group_size": 3, "lr": 1e-3} | settings
    job = make_job("opd", OPDStage(**values), folder, model_dir=student, teacher_dir=teacher)
    return Run(job).start()


def test_opd_learns_from_prompts_alone(tmp_path: Path, student: Path, teacher: Path) -> None:
    run = _opd(tmp_path, student, teacher, steps=16)
    _assert_model(run.model_dir)
    rows = run.rollouts()
    values = [row["kl"] for row in run.metrics()]
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    assert len(rows) == 16 * 4 * 3
    assert {row["verdict"] for row in rows} == {None}
    generated = sum(row["response_tokens"] for row in rows)
    trained = _body_tokens(student, _groups(rows, 3))
    own, theirs = _parameters(student), _parameters(teacher)
    assert run.spent() == {
        "labels": 0,
        "verifier_calls": 0,
        "prompts": 64,
        "generated_tokens": generated,
        "teacher_scored_tokens": trained,
        "trained_tokens": trained,
        "updates": 16,
        "flops": 2.0 * own * generated + 6.0 * own * trained + 2.0 * theirs * trained,
    }


def test_opd_of_the_whole_top_k_has_the_gradient_of_full(
    tmp_path: Path, student: Path, teacher: Path
) -> None:
    gradients = []
    for name, targets in (("full", FullVocabulary()), ("top_k", TopK(k=VOCAB))):
        job = make_job(
            "opd",
            OPDStage(steps=2, prompts_per_step=4, group_size=3, targets=targets, grad_clip=1e6),
            tmp_path / name,
            model_dir=student,
            teacher_dir=teacher,
        )
        Run(job).interrupted_at(1)
        (state,) = (job.checkpoint_dir / "steps").glob("*/tensors.safetensors")
        tensors = load_file(state)
        gradients.append({k: v for k, v in tensors.items() if k.startswith("exp_avg/")})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_opd_with_a_teacher_that_is_the_student_has_nothing_to_learn(
    tmp_path: Path, student: Path
) -> None:
    for name, targets in (("full", FullVocabulary()), ("top_k", TopK(k=8))):
        run = _opd(tmp_path / name, student, student, steps=1, targets=targets)
        assert run.metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert run.metrics()[0]["grad_norm"] < 1e-4
    run = _opd(tmp_path / "sampled", student, student, steps=1, targets=SampledToken())
    assert run.metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_larger_padded_vocabulary_of_the_teacher_changes_nothing(
    tmp_path: Path, student: Path, teacher: Path
) -> None:
    plain = _opd(tmp_path / "plain", student, teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(96, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 3.0  # padding that would be likely
    padded = tmp_path / "padded"
    model.save_pretrained(padded)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(padded)
    padded_run = _opd(tmp_path / "run", student, padded)
    assert [row["kl"] for row in padded_run.metrics()] == pytest.approx(
        [row["kl"] for row in plain.metrics()], rel=1e-5
    )


# --- GRPO ---------------------------------------------------------------------------------------


def _grpo(folder: Path, student: Path, **settings: Any) -> Run:
    values = {"steps": 3, "prompts_per_step": 4, "group_size": 6, "lr": 1e-3} | settings
    return Run(make_job("grpo", GRPOStage(**values), folder, model_dir=student), labels=True)


def test_grpo_counts_exactly_what_it_did(tmp_path: Path, student: Path) -> None:
    run = _grpo(tmp_path, student).start()
    _assert_model(run.model_dir)
    assert _changed(student, run.model_dir)
    rows = run.rollouts()
    gold = {label.problem_id: label.answer for label in problems().labels}
    for row in rows:
        boxed = row["response"].rpartition("\\boxed{")[2].partition("}")[0]
        right = "\\boxed{" in row["response"] and boxed == gold[row["problem_id"]]
        assert (row["verdict"] == "correct") == right == (row["reward"] == 1.0)
    groups = _groups(rows, 6)
    useful = [group for group in groups if len({row["reward"] for row in group}) > 1]
    assert 0 < len(useful) < len(groups)
    generated = sum(row["response_tokens"] for row in rows)
    trained = _body_tokens(student, useful)
    assert run.spent() == {
        "labels": len({row["problem_id"] for row in rows}),
        "verifier_calls": 3 * 4 * 6,
        "prompts": 3 * 4,
        "generated_tokens": generated,
        "teacher_scored_tokens": 0,
        "trained_tokens": trained,
        "updates": 3,
        "flops": _parameters(student) * (2.0 * generated + 6.0 * trained),
    }
    for step, row in enumerate(run.metrics()):
        own = groups[4 * step : 4 * step + 4]
        rewards = [r["reward"] for group in own for r in group]
        flat = sum(len({r["reward"] for r in group}) == 1 for group in own)
        assert row["pass_rate"] == pytest.approx(sum(rewards) / 24)
        assert row["zero_variance_share"] == flat / 4
        if flat < 4:
            assert row["sampler_gap"] < 1e-5  # sampler and trainer are one policy


def test_grpo_trains_on_what_a_reward_function_returns(tmp_path: Path, student: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def sevens(completions, **columns):\n"
        "    return [-0.5 * text.count('7') for text in completions]\n"
    )
    run = _grpo(tmp_path, student)
    run.verifier = f"reward:{rewards}:sevens"
    rows = run.start().rollouts()
    assert [row["reward"] for row in rows] == [-0.5 * row["response"].count("7") for row in rows]
    assert len({row["reward"] for row in rows}) > 2
    for step, values in enumerate(run.metrics()):
        drawn = [row for row in rows if row["step"] == step]
        rewards_seen = [row["reward"] for row in drawn]
        assert values["reward"] == pytest.approx(sum(rewards_seen) / len(drawn))
        assert values["reward_std"] == pytest.approx(np.std(rewards_seen, ddof=1))
        for group in _groups(drawn, 6):
            earned = np.array([row["reward"] for row in group])
            expected = (earned - earned.mean()) / (earned.std() or 1.0)
            assert [row["advantage"] for row in group] == pytest.approx(expected.tolist(), abs=1e-5)
        has_signal = any(len({row["reward"] for row in group}) > 1 for group in _groups(drawn, 6))
        assert values["pass_rate"] == 0.0 and (values["grad_norm"] > 0) == has_signal


def test_grpo_raises_the_pass_rate(tmp_path: Path, student: Path) -> None:
    run = _grpo(tmp_path, student, steps=25, prompts_per_step=10, lr=1e-3).start()
    rates = [row["pass_rate"] for row in run.metrics()]
    assert sum(rates[-5:]) > 1.5 * sum(rates[:5])


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path: Path, student: Path) -> None:
    run = _grpo(tmp_path, student, dynamic_sampling=DynamicSampling(max_rounds=3)).start()
    metrics, spent = run.metrics(), run.spent()
    replaced = sum(row["replaced_groups"] for row in metrics)
    assert replaced > 0
    assert spent["prompts"] == 3 * 4 + replaced
    assert spent["verifier_calls"] == 6 * spent["prompts"]
    plain = _grpo(tmp_path / "plain", student).start()
    assert sum(row["zero_variance_share"] for row in metrics) < sum(
        row["zero_variance_share"] for row in plain.metrics()
    )
    assert len(run.rollouts()) == 3 * 4 * 6  # only what was kept


def test_wrong_in_two_ways_is_no_signal(tmp_path: Path, student: Path) -> None:
    """A group of incorrect and unparseable answers has equal rewards: it must be replaced."""
    run = _grpo(
        tmp_path,
        student,
        steps=2,
        group_size=8,
        dynamic_sampling=DynamicSampling(max_rounds=40),
    ).start()
    for group in _groups(run.rollouts(), 8):
        assert {row["reward"] for row in group} == {0.0, 1.0}


def test_a_pool_smaller_than_the_batch_is_sampled_anew_each_time(
    tmp_path: Path, student: Path
) -> None:
    config = GRPOStage(steps=1, prompts_per_step=6, group_size=4)
    job = make_job("grpo", config, tmp_path, model_dir=student, problems=problems().problems[:2])
    run = Run(job, labels=True).start()
    groups = _groups(run.rollouts(), 4)
    texts = {(g[0]["problem_id"], tuple(row["response"] for row in g)) for g in groups}
    assert len(texts) == 6
    assert run.spent()["labels"] == 2


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_kl_penalty_is_zero_at_the_reference_and_trains_every_group(
    estimator: str, tmp_path: Path, student: Path
) -> None:
    kl = KLPenalty(coefficient=0.1, estimator=estimator)
    run = _grpo(tmp_path, student, kl=kl).start()
    values = [row["reference_kl"] for row in run.metrics()]
    assert values[0] == pytest.approx(0.0, abs=1e-7)
    assert values[2] > 1e-6
    rows = run.rollouts()
    trained = _body_tokens(student, _groups(rows, 6))  # flat groups too: the penalty is there
    spent = run.spent()
    assert spent["trained_tokens"] == trained
    generated = sum(row["response_tokens"] for row in rows)
    assert spent["flops"] == _parameters(student) * (2.0 * generated + 8.0 * trained)


def test_several_updates_a_batch_move_away_from_the_sampler(tmp_path: Path, student: Path) -> None:
    run = _grpo(tmp_path, student, updates_per_batch=4, lr=3e-3, prompts_per_step=8).start()
    assert run.spent()["updates"] == 12
    assert max(row.get("clipped_share", 0.0) for row in run.metrics()) > 0


def test_micro_batches_change_grpo_only_by_rounding(tmp_path: Path, student: Path) -> None:
    runs = [
        _grpo(tmp_path / str(tokens), student, steps=2, micro_batch_tokens=tokens).start()
        for tokens in (16384, 1)
    ]
    whole, split = (run.metrics() for run in runs)
    for a, b in zip(whole, split, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    first = [[row for row in run.rollouts() if row["step"] == 0] for run in runs]
    assert first[0] == first[1]
    before, after, other = (_weights(folder) for folder in (student, *(r.model_dir for r in runs)))
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before)
    apart = sum(float((after[name] - other[name]).square().sum()) for name in before)
    assert apart < 1e-4 * moved


def test_rollouts_of_a_problem_do_not_depend_on_its_company(tmp_path: Path, student: Path) -> None:
    job = make_job("grpo", GRPOStage(), tmp_path, model_dir=student)
    model = FrozenModel.load(student, torch.device("cpu"), torch.float32, VOCAB).model
    tokenizer = AutoTokenizer.from_pretrained(student)
    asked = problems().problems

    def draw(which: Iterable[int], **rows: int) -> list[list[tuple[int, ...]]]:
        source = RolloutSource(job, model, tokenizer, SAMPLING, **rows)
        groups = source.draw([asked[index] for index in which], 4, step=7)
        return [[r.response_ids for r in group.rollouts] for group in groups]

    together = draw(range(8))
    assert [draw([index])[0] for index in range(8)] == together
    assert draw(reversed(range(8)))[::-1] == together
    assert draw(range(8), max_rows=5) == together


def test_bfloat16_publishes_its_float32_masters(tmp_path: Path, student: Path) -> None:
    config = GRPOStage(steps=3, prompts_per_step=4, group_size=6, lr=1e-6)
    job = make_job(
        "grpo",
        config,
        tmp_path,
        model_dir=student,
        compute=Compute(device="cpu", precision="bfloat16"),
    )
    run = Run(job, labels=True).start()
    _assert_model(run.model_dir)
    before, after = _weights(student), _weights(run.model_dir)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 1e-7 < moved < 1e-5  # neither lost nor rounded to bfloat16 on the way


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_grades_every_attempt_on_its_own_account(tmp_path: Path, student: Path) -> None:
    config = Evaluation(attempts=3, batch_prompts=4)
    job = make_job("evaluate", config, tmp_path, model_dir=student)
    run = Run(job, labels=True).start()
    rows = pq.read_table(run.job.output_dir / "attempts.parquet").to_pylist()
    expected = [(p.id, attempt) for p in problems().problems for attempt in range(3)]
    assert [(row["problem_id"], row["attempt"]) for row in rows] == expected
    gold = {label.problem_id: label.answer for label in problems().labels}
    for row in rows:
        right = row["response"].endswith(f"\\boxed{{{gold[row['problem_id']]}}}")
        assert (row["verdict"] == "correct") == right
    spent = run.spent()
    assert (spent["labels"], spent["verifier_calls"], spent["prompts"]) == (10, 30, 10)
    assert spent["generated_tokens"] == sum(row["response_tokens"] for row in rows)
    with run.ledger() as ledger:
        assert ledger.spending().verifier_calls == 0  # nothing of it is training


# --- what the bridge may see --------------------------------------------------------------------


def test_only_what_reads_labels_reaches_the_vault() -> None:
    ways = (".vault", "stages.grading")
    for module in (opd, warmup, sample_sft, teacher_rollouts, teacher_term, pretrain):
        assert not any(way in inspect.getsource(module) for way in ways)
    for module in (grpo, mixed, sft):
        assert any(way in inspect.getsource(module) for way in ways)


def test_forward_kl_in_opd_differs_from_reverse(
    tmp_path: Path, student: Path, teacher: Path
) -> None:
    values = [
        _opd(tmp_path / kl.kind, student, teacher, steps=1, kl=kl).metrics()[0]["kl"]
        for kl in (OPDStage().kl, ForwardKL())
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-3)
