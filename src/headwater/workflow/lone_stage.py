"""One stage as a study of its own: the same graph, checks, workers, ledger and resumption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, ValidationError

from headwater.config.explain import explain
from headwater.config.recipe import Recipe, Task
from headwater.config.stages import READS_TEACHER, STAGE_MODELS
from headwater.errors import InputError
from headwater.tasks.pools import Pools
from headwater.tasks.problems import LabelledProblems
from headwater.workflow.graph import Graph
from headwater.workflow.node_settings import require_adapter_packages
from headwater.workflow.planner import build_graph
from headwater.workflow.prepare import (
    check_models,
    check_prompt,
    check_solutions,
    graph_data,
)
from headwater.workflow.study import Study

_NO_PROBLEMS = LabelledProblems((), ())


class _UnevaluatedTask(Task):
    """A task whose models nobody evaluates."""

    eval: dict[str, str] = Field(default_factory=dict)


class _StageRecipe(Recipe):
    """A recipe of one arm with one stage, which is not evaluated."""

    task: _UnevaluatedTask


@dataclass(frozen=True)
class LoneStage:
    """A stage, what it starts from, and what it reads.

    model, teacher: sources; a teacher for kinds that learn from one. settings: of the stage, as in
    a recipe. source: what `pretrain` imitates. verifier: "exact" where nothing is graded.
    recipe: further keys of a recipe, such as compute, budget and guards.
    """

    kind: str
    model: str
    settings: Mapping[str, Any]
    teacher: str | None = None
    problems: LabelledProblems = field(default=_NO_PROBLEMS, repr=False)
    source: str = "problems"
    verifier: str = "exact"
    prompt: str = "bare"
    task: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)


def study_of(stage: LoneStage) -> tuple[Study, str]:
    """The study of one stage, and the stage's fingerprint; everything is checked.

    Raises InputError for settings, models, problems, prompts and functions that cannot work.
    """
    recipe = _recipe(stage)
    check_models(recipe)
    pools = Pools({"labels": stage.problems, "prompts": stage.problems.without_labels()})
    if stage.kind == "grpo":
        check_prompt(recipe, stage.problems)
    whole = build_graph(recipe, graph_data(recipe, pools, {}))
    (plan,) = whole.arms
    end = plan.endpoint
    alone = replace(plan, student_evaluations={}, teacher_evaluations={}, probes={})
    graph = Graph({name: whole.nodes[name] for name in whole.closure([end])}, (alone,))
    require_adapter_packages(graph)
    study = Study(recipe, graph, pools, {})
    check_solutions(study)
    return study, end


def _recipe(stage: LoneStage) -> Recipe:
    settings = dict(stage.settings)
    _validate(STAGE_MODELS[stage.kind], settings, f"{stage.kind}: ")
    item = {stage.kind: settings}
    pretrains = stage.kind == "pretrain"
    models: dict[str, Any] = {
        "student": {"source": stage.model, "prepare": [item] if pretrains else []}
    }
    if stage.teacher is not None:
        models["teacher"] = {"source": stage.teacher}
    count = len(stage.problems)
    from_teacher = stage.kind in READS_TEACHER
    values = {
        "name": stage.kind,
        "task": {
            "train": stage.source,
            "verifier": stage.verifier,
            "prompt": stage.prompt,
            **stage.task,
        },
        "models": models,
        "pools": {"labels": max(1, count), "split": [], "prompts": count if from_teacher else 0},
        "arms": {
            stage.kind: {
                **({"teacher": []} if from_teacher else {}),
                "student": [] if pretrains else [item],
            }
        },
        "diagnostics": {"prompts": 0},
        "seeds": [stage.seed],
        **stage.recipe,
    }
    return _validate(_StageRecipe, values, "")


def _validate(model: Any, values: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}{explain(model, problem)}" for problem in error.errors()]
        raise InputError("\n".join(lines)) from None
