"""What every source model and its descendants will read in a study: prompts and responses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from headwater.tasks.prompts import render_solution
from headwater.tasks.readings import Reading
from headwater.workflow.graph import StageNode, sampling_of
from headwater.workflow.study import Study


def readings_of(study: Study, published: Collection[str] = ()) -> Mapping[str, tuple[Reading, ...]]:
    """Root source -> what the stages of its descendants read, each pool with its longest responses.

    Stages that are `published` have read theirs. Pretraining makes its own traces, which are
    as short as the task's.
    """
    graph = study.graph
    longest: dict[str, dict[str, StageNode]] = defaultdict(dict)
    supervised: dict[str, dict[str, StageNode]] = defaultdict(dict)
    for fingerprint, node in graph.nodes.items():
        where = _where(node)
        if where is None or fingerprint in published:
            continue
        for root in {graph.root(model) for model in (node.model, *node.asked) if model}:
            if node.kind == "sft":
                supervised[root][where] = node
            elif _sampled(study, node) > _sampled(study, longest[root].get(where)):
                longest[root][where] = node
    return {
        root: tuple(
            [Reading(w, study.problems_of(n), _sampled(study, n)) for w, n in longest[root].items()]
            + [
                Reading(w, study.problems_of(n), responses=_responses(study, n))
                for w, n in supervised[root].items()
            ]
        )
        for root in {**longest, **supervised}
    }


def _where(node: StageNode) -> str | None:
    if node.eval_set is not None:
        return f"evaluation set {node.eval_set}"
    return None if node.pool is None else f"pool {node.pool}"


def _sampled(study: Study, node: StageNode | None) -> int:
    return 0 if node is None else sampling_of(node, study.recipe).max_new_tokens


def _responses(study: Study, node: StageNode) -> tuple[str, ...]:
    form = study.recipe.task.prompt
    return tuple(
        render_solution(form, label.solution, label.answer) for label in study.labels_of(node) or ()
    )
