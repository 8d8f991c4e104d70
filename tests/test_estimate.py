"""Planning: counts of every stage kind, shared and cached stages, totals and warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headwater.config.loading import validate_recipe
from headwater.models.size import ModelSize
from headwater.workflow import calibration
from headwater.workflow.cost import Machine
from headwater.workflow.devices import Offer
from headwater.workflow.estimate import Plan, estimate, model_sizes
from headwater.workflow.prepare import prepare_study
from headwater.workflow.stage_groups import grouped
from headwater.workflow.stage_work import StageWork, work_of
from headwater.workflow.study import Study

CPU = Machine("cpu", processes=1, threads=1, offer=Offer(rates=calibration.CPU))


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
    one, many = (estimate(study, replace(CPU, processes=n)).to_do.seconds for n in (1, 100))
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


def test_a_group_of_rollouts_is_one_micro_batch(study: Study) -> None:
    stages = recipe()["stages"]
    stages["grpo"] |= {"micro_batch_tokens": 5}
    stages["warmup"] |= {"micro_batch_tokens": 5}
    small = study_of(stages=stages)
    assert work(small, "grpo", "1H").micro_batch_tokens == 2 * 10
    assert work(small, "warmup").micro_batch_tokens == 10
    assert work(study, "grpo", "1H").micro_batch_tokens == 5 * 2 * 10  # all there is


def test_a_plan_is_plain_values(study: Study) -> None:
    plan: Plan = estimate(study, CPU)
    plain = plan.as_dict()
    assert plain["training"]["updates"] == plan.training.updates
    assert len(plain["stages"]) == len(study.graph.nodes)
