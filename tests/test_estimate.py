"""Planning: counts of every stage kind, shared and cached stages, totals and warnings."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.config.loading import validate_recipe
from headwater.models.size import ModelSize
from headwater.workflow.cost import Machine
from headwater.workflow.estimate import Plan, estimate, model_sizes
from headwater.workflow.gpus import GpuOffer, gpu_need
from headwater.workflow.prepare import prepare_study
from headwater.workflow.stage_groups import grouped
from headwater.workflow.stage_work import StageWork, work_of
from headwater.workflow.study import Study

CPU = Machine("cpu", processes=1, threads=1)


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "name": "planned",
        "task": {
            "train": "task:arithmetic?count=300",
            "eval": {"held_out": "task:arithmetic?seed=1&count=40"},
            "prompt": "bare",
        },
        "models": {
            "teacher": {"source": "tiny:teacher", "prepare": ["pretrain"]},
            "student": {"source": "prune:teacher", "layers": 2},
        },
        "pools": {"labels": 40, "split": ["1H", "2H"], "prompts": 100, "worked": 30},
        "sampling": {"max_new_tokens": 10},
        "evaluation": {"attempts": 4, "problems": 20},
        "stages": {
            "pretrain": {"steps": 6, "batch_size": 2},
            "sft": {"epochs": 2, "batch_size": 25},
            "grpo": {"steps": 3, "prompts_per_step": 5, "group_size": 2},
            "warmup": {"epochs": 3, "batch_size": 30, "teacher_rollouts_per_prompt": 2},
            "opd": {"steps": 7, "prompts_per_step": 4, "group_size": 2},
        },
        "arms": {
            "cold": {"student": ["grpo"]},
            "bridge": {"teacher": ["sft", {"grpo": "1H"}], "student": ["warmup", "opd"]},
            "half": {
                "teacher": ["sft", {"grpo": "1H"}],
                "student": ["warmup", "opd", {"grpo": {"pool": "2H", "steps": 100}}],
            },
        },
        **changes,
    }


def study_of(**changes: Any) -> Study:
    return prepare_study(validate_recipe(recipe(**changes)))


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of()


def work(study: Study, kind: str, pool: str | None = None) -> StageWork:
    nodes = [n for n in study.graph.nodes.values() if n.kind == kind and pool in (None, n.pool)]
    return work_of(study, nodes[0])


def test_pretraining_counts_updates(study: Study) -> None:
    assert work(study, "pretrain").updates == 6
    assert work(study, "pretrain").labels == 0


def test_sft_reads_every_worked_solution(study: Study) -> None:
    found = work(study, "sft")
    assert (found.updates, found.labels, found.verifier_calls) == (4, 30, 0)  # 2 * ceil(30 / 25)


def test_grpo_reads_a_label_a_prompt_and_grades_every_rollout(study: Study) -> None:
    found = work(study, "grpo", "1H")
    assert (found.prompts, found.rollouts, found.verifier_calls, found.updates) == (15, 30, 30, 3)
    assert (found.labels, found.generated_tokens, found.trained_tokens) == (15, 300, 300)


def test_grpo_cannot_read_more_labels_than_there_are(study: Study) -> None:
    found = work(study, "grpo", "2H")
    assert (found.prompts, found.labels) == (500, 20)


def test_several_updates_and_dynamic_sampling_count() -> None:
    stages = recipe()["stages"]
    stages["grpo"] |= {"updates_per_batch": 2, "dynamic_sampling": {"max_rounds": 2}}
    found = work(study_of(stages=stages), "grpo", "1H")
    assert (found.updates, found.rollouts, found.verifier_calls) == (6, 90, 90)
    assert found.trained_tokens == 600


def test_the_bridge_reads_no_label(study: Study) -> None:
    rollouts = work(study, "teacher_rollouts")
    assert (rollouts.rollouts, rollouts.scored, rollouts.updates) == (200, True, 0)
    warmup = work(study, "warmup")
    assert (warmup.updates, warmup.rollouts) == (21, 0)  # 3 * ceil(200 / 30)
    opd = work(study, "opd")
    assert (opd.updates, opd.rollouts, opd.scored) == (7, 56, True)
    assert rollouts.labels == warmup.labels == opd.labels == 0


def test_evaluation_counts_its_own(study: Study) -> None:
    found = work(study, "evaluate")
    assert (found.rollouts, found.verifier_calls, found.prompts) == (80, 80, 20)


def test_an_arm_uses_what_it_shares(study: Study) -> None:
    plan = estimate(study, CPU)
    arms = {arm.arm: arm.spending for arm in plan.arms}
    assert arms["cold"].updates == 6 + 3
    assert arms["bridge"].updates == 6 + 4 + 3 + 21 + 7
    assert arms["half"].updates == arms["bridge"].updates + 100
    assert arms["cold"].labels == 15
    assert arms["bridge"].labels == 30 + 15
    assert arms["half"].labels == 30 + 15 + 20
    assert plan.training.updates == arms["half"].updates + 3  # each stage once
    assert plan.training.labels == 30 + min(40, 15 + 15 + 20)


def test_shared_and_cached_stages_are_marked(study: Study) -> None:
    every = estimate(study, CPU)
    shared = {stage.kind for stage in every.stages if stage.shared}
    assert {"pretrain", "warmup", "opd", "sft"} <= shared
    pretrained = next(stage.fingerprint for stage in every.stages if stage.kind == "pretrain")
    plan = estimate(study, CPU, cached={pretrained})
    assert [stage.fingerprint for stage in plan.stages if stage.cached] == [pretrained]
    assert plan.to_do.updates == every.to_do.updates - 6
    assert plan.training == every.training
    done = estimate(study, CPU, cached=set(study.graph.nodes))
    assert (done.to_do.updates, done.to_do.seconds, done.to_do.labels) == (0, 0.0, 0)


def test_flops_are_two_a_parameter_forward_and_four_backward(study: Study) -> None:
    plan = estimate(study, CPU)
    sizes = sizes_of(study)
    (stage,) = [s for s in plan.stages if s.kind == "grpo" and s.pool == "1H"]
    assert stage.spending.flops == (2 + 6) * 300 * sizes["teacher"].matmul_parameters
    (opd,) = [s for s in plan.stages if s.kind == "opd"]
    own, teacher = sizes["student"].matmul_parameters, sizes["teacher"].matmul_parameters
    assert opd.spending.flops == (2 + 6) * 560 * own + 2 * 560 * teacher


def sizes_of(study: Study) -> dict[str, ModelSize]:
    return {name: size for name, size in model_sizes(study.recipe).items() if size is not None}


def test_a_pruned_model_has_fewer_layers(study: Study) -> None:
    sizes = sizes_of(study)
    assert sizes["student"].layers == 2
    assert sizes["student"].hidden == sizes["teacher"].hidden


def test_more_processes_shorten_a_run_but_no_chain(study: Study) -> None:
    one, many = (estimate(study, Machine("cpu", n, 1)).to_do.seconds for n in (1, 100))
    longest = max(arm.spending.seconds for arm in estimate(study, CPU).arms)
    assert one > many >= longest > 0


def test_a_budget_that_may_stop_the_run_is_said() -> None:
    plan = estimate(study_of(budget={"labels": 25, "verifier_calls": 100_000}), CPU)
    (warning,) = plan.warnings
    assert warning.startswith("budget.labels=25 may stop the run: its stages take up to 70")


def test_an_unknown_size_is_said_and_counts_as_nothing(study: Study) -> None:
    models = {"teacher": {"source": "hf:owner/name"}, "student": {"source": "tiny:student"}}
    plan = estimate(study_of(models=models), CPU)
    assert any("size of teacher not known" in warning for warning in plan.warnings)
    (stage,) = [s for s in plan.stages if s.kind == "teacher_rollouts"]
    assert (stage.spending.flops, stage.spending.generated_tokens) == (0.0, 2000)


def test_a_mean_response_makes_counts_of_upper_bounds(study: Study) -> None:
    plan = estimate(study, CPU, mean_response=4)
    every = estimate(study, CPU)
    assert plan.training.generated_tokens * 10 == every.training.generated_tokens * 4
    assert plan.training.verifier_calls == every.training.verifier_calls
    longer = estimate(study, CPU, mean_response=1000)  # no longer than the stages allow
    assert longer == every


def test_seeds_and_arms_of_a_stage_are_taken_together() -> None:
    plan = estimate(study_of(seeds=[0, 1, 2]), CPU)
    groups = {(g.kind, g.model, g.pool): g for g in grouped(plan.stages)}
    grpo = groups["grpo", "student", "labels"]
    assert (grpo.stages, grpo.seeds, grpo.arms) == (3, (0, 1, 2), ("cold",))
    assert (grpo.spending.updates, grpo.spending.labels) == (9, 15)
    assert sum(group.stages for group in groups.values()) == len(plan.stages)
    assert sum(g.spending.updates for g in groups.values()) == plan.training.updates


# --- GPUs ----------------------------------------------------------------------------------------

SIZE = ModelSize(
    parameters=1_000_000_000,
    matmul_parameters=900_000_000,
    layers=20,
    hidden=2000,
    vocabulary=100_000,
    kv_values_per_token=20_000,
    attention_width=2000,
)
GRPO = StageWork(
    updates=10,
    trained_tokens=10 * 64 * 1000,
    rollouts=10 * 64,
    rollout_batches=10,
    max_new_tokens=1000,
    mean_new_tokens=1000,
    prompts=80,
    micro_batch_tokens=16_000,
)


def test_the_parts_of_memory() -> None:
    need = gpu_need(GRPO, SIZE, SIZE, GpuOffer())
    assert need.weights_bytes == 2e9
    assert need.optimiser_bytes == 16e9
    assert need.beside_bytes == 2e9
    assert need.activations_bytes == 16_000 * 20 * 2000 * 18 * 2
    assert need.kv_cache_bytes == 64 * 1000 * 20_000 * 2
    assert need.decoding_rows == 64
    assert need.gpus == need.smallest == 1
    assert need.bytes_per_gpu == 2e9 + 16e9 + 2e9 + need.activations_bytes
    in_float32 = gpu_need(GRPO, SIZE, None, GpuOffer(), value_bytes=4)
    assert (in_float32.weights_bytes, in_float32.optimiser_bytes) == (4e9, 12e9)


@pytest.mark.parametrize(("gib", "gpus"), [(80, 1), (40, 2), (24, 2), (12, 4), (2, 32)])
def test_gpus_are_the_smallest_power_of_two_that_holds_a_stage(gib: int, gpus: int) -> None:
    need = gpu_need(GRPO, SIZE, SIZE, GpuOffer(gib * 2**30))
    assert need.gpus == gpus
    assert need.bytes_per_gpu <= 0.9 * gib * 2**30
    if gpus > 1:  # half as many could not
        held = need.weights_bytes + need.optimiser_bytes + need.beside_bytes
        assert (held + need.activations_bytes) / (gpus // 2) > 0.9 * gib * 2**30


def test_hours_of_training_follow_from_flops() -> None:
    work = StageWork(updates=1, trained_tokens=10**9, mean_new_tokens=4000, micro_batch_tokens=4000)
    need = gpu_need(work, SIZE, None, GpuOffer())
    per_token = 6 * SIZE.matmul_parameters + 6 * 20 * 2000 * 4000  # attention to half of it
    assert need.seconds == pytest.approx(1e9 * per_token / (0.4 * 989e12))
    assert need.gpu_hours == pytest.approx(need.seconds / 3600)
    four = gpu_need(work, SIZE, None, GpuOffer(count=4))
    assert four.seconds == pytest.approx(need.seconds / 4)
    assert four.gpu_hours == pytest.approx(need.gpu_hours)


def test_decoding_reads_weights_and_cache_for_as_many_rows_as_fit() -> None:
    work = StageWork(
        rollouts=300, rollout_batches=1, max_new_tokens=50_000, mean_new_tokens=10_000, prompts=300
    )
    need = gpu_need(work, SIZE, None, GpuOffer())
    row = 50_000 * 20_000 * 2  # 2 GB at full length
    assert need.decoding_rows == int((0.9 * 80 * 2**30 - 2e9) // row) == 37
    steps = 9 * 10_000  # ceil(300 / 37) rounds of rows
    read = 2 * 0.9e9 + 37 * 5_000 * 20_000 * 2
    assert need.seconds == pytest.approx(steps * read / 3.35e12)
    assert gpu_need(work, SIZE, None, GpuOffer(count=8)).decoding_rows == 300


def test_a_reference_is_held_and_read(study: Study) -> None:
    stages = recipe()["stages"]
    stages["grpo"] |= {"kl": {"coefficient": 1e-3}}
    found = work(study_of(stages=stages), "grpo", "1H")
    assert found.referenced
    assert not work(study, "grpo", "1H").referenced
    plan = estimate(study_of(stages=stages), CUDA)
    (stage,) = [s for s in plan.stages if s.kind == "grpo" and s.pool == "1H"]
    assert stage.gpus is not None
    assert stage.gpus.beside_bytes == stage.gpus.weights_bytes
    size = sizes_of(study)["teacher"]
    assert stage.spending.flops == (2 + 6 + 2) * 300 * size.matmul_parameters


def test_a_group_of_rollouts_is_one_micro_batch(study: Study) -> None:
    stages = recipe()["stages"]
    stages["grpo"] |= {"micro_batch_tokens": 5}
    stages["warmup"] |= {"micro_batch_tokens": 5}
    small = study_of(stages=stages)
    assert work(small, "grpo", "1H").micro_batch_tokens == 2 * 10
    assert work(small, "warmup").micro_batch_tokens == 10
    assert work(study, "grpo", "1H").micro_batch_tokens == 5 * 2 * 10  # all there is


CUDA = Machine("cuda", processes=1, threads=1)


def test_a_plan_for_gpus_has_needs_totals_and_says_what_it_rests_on(study: Study) -> None:
    plan = estimate(study, CUDA)
    needs = {s.kind: s.gpus for s in plan.stages}
    assert needs["source"] is None
    assert all(need is not None for kind, need in needs.items() if kind != "source")
    opd, rollouts = needs["opd"], needs["teacher_rollouts"]
    assert opd is not None and rollouts is not None
    assert opd.beside_bytes == 2 * sizes_of(study)["teacher"].parameters
    assert rollouts.beside_bytes == 0, "the teacher that samples is held once"
    hours = sum(s.spending.seconds for s in plan.stages) / 3600
    assert plan.gpu_hours == pytest.approx(hours)  # all fit on one GPU
    assert plan.assumptions is not None
    assert "40% of 989 TFLOP/s" in plan.assumptions
    assert "planned, not yet runnable" in plan.assumptions
    row = next(row for row in plan.as_dict()["stages"] if row["kind"] == "opd")
    assert row["gpus"]["bytes_per_gpu"] == opd.bytes_per_gpu
    on_cpu = estimate(study, CPU)
    assert (on_cpu.assumptions, on_cpu.gpu_hours) == (None, 0.0)
    assert all(stage.gpus is None for stage in on_cpu.stages)


def test_too_few_gpus_are_said() -> None:
    models = {"teacher": {"source": "hf:Qwen/Qwen3-8B"}, "student": {"source": "hf:Qwen/Qwen3-4B"}}
    offer = GpuOffer(80 * 2**30, 2)
    plan = estimate(study_of(models=models), Machine("cuda", 1, 1, offer))
    (warning,) = plan.warnings
    assert warning.startswith("--gpus 2 is too few for 1 of the stages, which need up to 4")
    assert {s.gpus.gpus for s in plan.stages if s.gpus is not None} == {2, 4}


def test_a_plan_is_plain_values(study: Study) -> None:
    plan: Plan = estimate(study, CPU)
    plain = plan.as_dict()
    assert plain["training"]["updates"] == plan.training.updates
    assert len(plain["stages"]) == len(study.graph.nodes)
