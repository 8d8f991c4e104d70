"""From recipes to graphs: what is shared, what is apart, in which order, under which names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from headwater.config.distillation import TopK
from headwater.config.loading import validate_recipe
from headwater.config.recipe import Recipe
from headwater.errors import InputError
from headwater.types import Label, Problem
from headwater.workflow.data_identity import DataIdentity, GraphData, identify
from headwater.workflow.graph import ArmPlan, Graph
from headwater.workflow.planner import build_graph
from headwater.workflow.schedule import urgency

ARMS: dict[str, Any] = {
    "cold": {"student": ["grpo"]},
    "raw_bridge": {"teacher": [], "student": ["warmup", "opd"]},
    "bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]},
    "half": {"teacher": ["grpo"], "student": ["warmup", "opd", {"grpo": "2H"}]},
}


def recipe(arms: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    return validate_recipe(
        {
            "name": "study",
            "task": {"train": "task:arithmetic", "eval": {"one": "a.jsonl", "two": "b.jsonl"}},
            "models": {
                "teacher": {"source": "tiny:teacher", "prepare": ["pretrain"]},
                "student": {"source": "tiny:student", "prepare": ["pretrain"]},
            },
            "pools": {"labels": 40, "prompts": 100},
            "arms": arms or ARMS,
        }
        | changes
    )


def data(**pools: str) -> GraphData:
    names = ("labels", "1H", "2H", "prompts", "worked")
    return GraphData(
        {name: DataIdentity(pools.get(name, name), f"{name} answers", 20) for name in names},
        {name: DataIdentity(name, f"{name} answers", 5) for name in ("one", "two")},
    )


def graph_of(arms: dict[str, Any] | None = None, **changes: Any) -> Graph:
    return build_graph(recipe(arms, **changes), data())


def arm(graph: Graph, name: str, seed: int = 0) -> ArmPlan:
    return next(plan for plan in graph.arms if (plan.arm, plan.seed) == (name, seed))


def kinds(graph: Graph, fingerprints: tuple[str, ...]) -> list[str]:
    return [f"{graph.nodes[f].role} {graph.nodes[f].kind}" for f in fingerprints]


def test_arms_with_equal_beginnings_share_stages() -> None:
    graph = graph_of()
    bridge, half = arm(graph, "bridge"), arm(graph, "half")
    assert set(graph.arm_stages(half)) - set(graph.arm_stages(bridge)) == {half.student}
    assert graph.nodes[half.student].model == bridge.student
    assert graph.nodes[half.student].pool == "2H"
    assert half.teacher == bridge.teacher
    assert graph.users[bridge.student] == ("bridge", "half")


def test_an_arm_is_made_of_sources_preparation_and_both_chains_in_order() -> None:
    graph = graph_of()
    alone = build_graph(recipe(), data(), arms=["bridge"])
    assert kinds(alone, alone.arm_stages(arm(alone, "bridge"))) == [
        "base source",
        "base pretrain",
        "teacher grpo",
        "base source",
        "base pretrain",
        "teacher teacher_rollouts",
        "student warmup",
        "student opd",
    ]
    assert kinds(graph, graph.arm_stages(arm(graph, "cold"))) == [
        "base source",
        "base pretrain",
        "student grpo",
    ]


def test_a_base_with_a_seed_of_its_own_is_made_once_for_all_seeds() -> None:
    teacher = {"source": "tiny:teacher", "prepare": ["pretrain"], "seed": 7}
    student = {"source": "prune:teacher", "layers": 1, "prepare": [{"sft": {"steps": 2}}]}
    models = {"teacher": teacher, "student": student}
    pools = {"labels": 40, "prompts": 100, "worked": 20}
    graph = graph_of(models=models, pools=pools, seeds=[3, 4])
    bases = {(base.model_name, base.seed): base for base in graph.bases}
    assert bases["teacher", 3].model == bases["teacher", 4].model
    assert graph.nodes[bases["teacher", 3].model].seed == 7
    assert bases["teacher", 3].evaluations != bases["teacher", 4].evaluations
    assert arm(graph, "bridge", 3).teacher != arm(graph, "bridge", 4).teacher
    healed = [node for node in graph.nodes.values() if node.kind == "sft"]
    assert sorted(node.seed for node in healed) == [3, 4]
    assert len({node.model for node in healed}) == 1  # both cut from the one teacher

    apart = {**models, "teacher": {**teacher, "seed": None}}
    alone = graph_of(models=apart, pools=pools, seeds=[7])
    by_name = {base.model_name: base.model for base in alone.bases}
    assert by_name["teacher"] == bases["teacher", 3].model  # the seed decides, wherever it stands


def test_parents_come_before_their_children() -> None:
    graph = graph_of(seeds=[0, 1])
    place = {fingerprint: index for index, fingerprint in enumerate(graph.nodes)}
    assert all(
        place[parent] < place[node.fingerprint]
        for node in graph.nodes.values()
        for parent in node.parents
    )


def test_each_kind_has_the_parents_it_reads() -> None:
    graph = graph_of()
    bridge = arm(graph, "bridge")
    opd = graph.nodes[bridge.student]
    warmup = graph.nodes[opd.model]
    rollouts = graph.nodes[warmup.rollouts]
    assert (opd.teacher, opd.rollouts) == (bridge.teacher, None)
    assert warmup.teacher is None
    assert (rollouts.model, rollouts.teacher) == (None, bridge.teacher)


def test_teacher_rollouts_take_the_warmups_settings_and_the_recipes_sampling() -> None:
    stages = {"warmup": {"teacher_rollouts_per_prompt": 3, "targets": {"kind": "top_k", "k": 8}}}
    graph = graph_of(stages=stages, sampling={"temperature": 0.7, "max_new_tokens": 33})
    (settings,) = {
        node.settings() for node in graph.nodes.values() if node.kind == "teacher_rollouts"
    }
    assert settings.rollouts_per_prompt == 3
    assert settings.targets == TopK(k=8)
    assert (settings.sampling.temperature, settings.sampling.max_new_tokens) == (0.7, 33)


def test_every_endpoint_teacher_and_base_teacher_is_evaluated_on_every_set() -> None:
    graph = graph_of()
    for plan in graph.arms:
        assert set(plan.evaluations) == {"one", "two"}
        assert set(plan.teacher_evaluations) == ({"one", "two"} if plan.teacher else set())
    (base,) = graph.bases
    assert base.model == arm(graph, "raw_bridge").teacher
    assert base.evaluations == arm(graph, "raw_bridge").teacher_evaluations
    evaluated = {n.model for n in graph.nodes.values() if n.kind == "evaluate"}
    assert len(evaluated) == 6  # four students, the RL'd and the raw teacher


def test_an_empty_student_chain_is_the_base_student() -> None:
    graph = graph_of({"base": {"student": []}, "rl": {"teacher": ["grpo"]}})
    assert kinds(graph, graph.arm_stages(arm(graph, "base"))) == ["base source", "base pretrain"]
    assert arm(graph, "rl").evaluates == "teacher"
    assert kinds(graph, (arm(graph, "rl").endpoint,)) == ["teacher grpo"]


def test_a_pruned_model_is_cut_from_the_prepared_parent() -> None:
    graph = graph_of(
        models={
            "teacher": {"source": "tiny:teacher", "prepare": ["pretrain"]},
            "student": {"source": "prune:teacher", "layers": 2},
        }
    )
    cold = graph.nodes[arm(graph, "cold").student]
    pruned = graph.nodes[cold.model]
    assert pruned.kind == "source"
    assert graph.nodes[pruned.model].kind == "pretrain"
    assert graph.nodes[pruned.model].model_name == "teacher"


def test_a_teacher_nobody_reads_is_refused() -> None:
    with pytest.raises(InputError, match=r"arms\.waste: trains a teacher that no stage"):
        graph_of({"waste": {"teacher": ["grpo"], "student": ["grpo"]}})


def test_unknown_arms_are_refused_and_chosen_ones_stand_alone() -> None:
    with pytest.raises(InputError, match="--arms bridg: not an arm"):
        build_graph(recipe(), data(), arms=["bridg"])
    graph = build_graph(recipe(), data(), arms=["cold"], seeds=[3])
    assert [(plan.arm, plan.seed) for plan in graph.arms] == [("cold", 3)]
    assert {node.model_name for node in graph.nodes.values()} == {"student"}


@pytest.mark.parametrize(
    ("seeds", "shown"), [([], "(none)"), ([0, -1], "0,-1"), ([2, 1, 2], "2,1,2")]
)
def test_seeds_that_are_none_are_refused(seeds: list[int], shown: str) -> None:
    with pytest.raises(InputError, match=f"--seeds {re.escape(shown)}: expected different"):
        build_graph(recipe(), data(), seeds=seeds)


def test_seeds_share_downloaded_models_but_not_random_ones() -> None:
    models = {
        "teacher": {"source": "hf:some/model"},
        "student": {"source": "prune:teacher", "layers": 2},
    }
    graph = graph_of(models=models, seeds=[0, 1])
    assert [n.kind for n in graph.nodes.values()].count("source") == 2
    assert arm(graph, "cold", 0).student != arm(graph, "cold", 1).student
    assert graph.nodes[arm(graph, "cold", 1).student].seed == 1
    random = graph_of(seeds=[0, 1])
    assert [n.kind for n in random.nodes.values()].count("source") == 4


def endpoint(name: str = "bridge", graph_data: GraphData | None = None, **changes: Any) -> str:
    return arm(build_graph(recipe(**changes), graph_data or data()), name).endpoint


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": {"opd": {"lr": 2e-6}}},
        {"stages": {"grpo": {"clip_high": 0.3}}},
        {"sampling": {"temperature": 0.9}},
        {"task": {"train": "task:arithmetic", "eval": {"one": "a.jsonl"}, "prompt": "hash"}},
        {"compute": {"precision": "bfloat16"}},
    ],
)
def test_what_changes_the_result_changes_the_name(changes: dict[str, Any]) -> None:
    assert endpoint(**changes) != endpoint()


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": {"opd": {"checkpoint_seconds": 5.0}}},
        {"stages": {"grpo": {"micro_batch_tokens": 512}}},
        {"compute": {"processes": 3, "threads": 2}},
        {"budget": {"labels": 7}},
        {"evaluation": {"attempts": 3}},
        {"stages": {"sft": {"lr": 1e-3}}},
    ],
)
def test_what_does_not_change_the_result_keeps_the_name(changes: dict[str, Any]) -> None:
    assert endpoint(**changes) == endpoint()


def test_answers_matter_to_stages_that_read_them_alone() -> None:
    other = data()
    pools = dict(other.pools) | {"prompts": DataIdentity("prompts", "others", 20)}
    assert endpoint(graph_data=GraphData(pools, other.evals)) == endpoint()
    pools = dict(other.pools) | {"labels": DataIdentity("labels", "others", 20)}
    assert endpoint(graph_data=GraphData(pools, other.evals)) != endpoint()


def test_a_verifier_matters_to_stages_that_grade_alone() -> None:
    task = {"train": "task:arithmetic", "eval": {"one": "a.jsonl", "two": "b.jsonl"}}
    exact = task | {"verifier": "exact"}
    assert endpoint("raw_bridge", task=exact) == endpoint("raw_bridge", task=task)
    assert endpoint("cold", task=exact) != endpoint("cold", task=task)


def test_the_code_of_a_verifier_matters_to_stages_that_grade_alone() -> None:
    plain = data()
    coded = [replace(plain, verifier_code=code) for code in ("one", "other")]
    assert len({endpoint("cold", graph_data=found) for found in (plain, *coded)}) == 3
    assert len({endpoint("raw_bridge", graph_data=found) for found in (plain, *coded)}) == 1


def test_the_files_of_a_local_model_matter() -> None:
    plain = data()
    files = [replace(plain, source_files={"tiny:student": found}) for found in ("one", "other")]
    assert len({endpoint("cold", graph_data=found) for found in (plain, *files)}) == 3
    assert len({arm_teacher(found) for found in (plain, *files)}) == 1


def arm_teacher(graph_data: GraphData) -> str | None:
    return arm(build_graph(recipe(), graph_data), "bridge").teacher


def test_a_repeated_stage_draws_other_numbers() -> None:
    graph = graph_of({"twice": {"student": ["grpo", "grpo", {"grpo": "2H"}]}})
    stages = graph.arm_stages(arm(graph, "twice"))
    streams = [graph.nodes[fingerprint].stream for fingerprint in stages[-3:]]
    assert streams == ["grpo:labels", "grpo:labels:2", "grpo:2H"]


def test_urgency_is_the_work_that_waits_behind() -> None:
    graph = graph_of()
    found = urgency(graph)
    half = arm(graph, "half")
    path = [half.teacher, graph.nodes[arm(graph, "bridge").student].model, half.student]
    assert found[path[0]] > found[path[1]] > found[path[2]]
    assert all(found[p] > found[f] for f, n in graph.nodes.items() for p in n.parents)


def test_identity_covers_prompts_answers_and_order() -> None:
    problems = (Problem("a", "1+1", "s"), Problem("b", "2+2", "s"))
    labels = (Label("a", "2"), Label("b", "4"))
    found = identify(problems, labels)
    assert found.size == 2
    assert identify(problems, labels) == found
    assert identify(problems[::-1], labels).problems != found.problems
    changed = identify(problems, (Label("a", "3"), labels[1]))
    assert (changed.problems, changed.labels != found.labels) == (found.problems, True)
