"""From a recipe to a study: data read, decontaminated, divided, everything checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from headwater.config.evaluation import Evaluation
from headwater.config.recipe import Recipe
from headwater.errors import InputError
from headwater.models.size import model_configs
from headwater.models.source_names import require_available
from headwater.seeding import generator
from headwater.tasks.contamination import ContaminationReport
from headwater.tasks.pools import Pools, make_pools
from headwater.tasks.problems import LabelledProblems
from headwater.tasks.prompts import check_prompt_matches_verifier
from headwater.verify.verifiers import (
    accepts_examples,
    check_answers,
    make_verifier,
    reads_rows,
)
from headwater.workflow.contrasts import check_contrasts
from headwater.workflow.data_identity import DataIdentity, GraphData, identify
from headwater.workflow.identities import (
    own_code_warnings,
    rollout_files,
    runs_own_code,
    source_files,
    verifier_code,
)
from headwater.workflow.matching import match_arms
from headwater.workflow.node_settings import require_adapter_packages
from headwater.workflow.planner import build_graph
from headwater.workflow.study import Study
from headwater.workflow.study_data import POOL, read_data, unread_warnings


def prepare_study(
    recipe: Recipe,
    *,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    planning: bool = False,
) -> Study:
    """Read and check everything a recipe names, without torch and without training.

    planning: hub datasets that cannot be reached are stood in for, with a warning, and no function
    that the recipe names is called.
    Raises InputError for data, pools, models, prompts or arms that cannot work.
    """
    check_models(recipe)
    task, sizes = recipe.task, recipe.pools
    read = read_data(recipe, planning=planning)
    pools = make_pools(
        read.train,
        labels=sizes.labels,
        split=sizes.split,
        prompts=sizes.prompts,
        worked=sizes.worked,
        validation=sizes.validation,
        seed=sizes.seed,
        worked_data=read.worked,
    )
    evals = {
        name: _first(
            name,
            pools.labelled(source.removeprefix(POOL))
            if source.startswith(POOL)
            else read.evals[name],
            recipe.evaluation,
        )
        for name, source in task.eval.items()
    }
    only_named = planning and runs_own_code(task.verifier)
    if task.train not in read.unread and not only_named:
        check_prompt(recipe, read.train)
    data = graph_data(recipe, pools, evals)
    whole = build_graph(recipe, data, seeds=recipe.seeds[:1])
    found = read.contamination
    warnings = (*own_code_warnings(task.verifier), *unread_warnings(read), *_warnings(found))
    rows = _contamination_rows(found)
    study = Study(recipe, whole, pools, evals, rows, warnings, read.sources)
    matched = match_arms(study)
    if matched is not recipe:
        data = graph_data(matched, pools, evals, data)
        whole = build_graph(matched, data, seeds=recipe.seeds[:1])
        study = replace(study, recipe=matched, graph=whole)
    check_contrasts(study)
    study = replace(study, graph=build_graph(matched, data, seeds=seeds, arms=arms))
    require_adapter_packages(study.graph)
    check_solutions(study)
    return study


def check_models(recipe: Recipe) -> None:
    """Whether what models come from is there. Raises InputError."""
    for spec in recipe.models.values():
        require_available(spec.source)
    model_configs(recipe.models)  # layers that a parent does not have


def graph_data(
    recipe: Recipe,
    pools: Pools,
    evals: Mapping[str, LabelledProblems],
    before: GraphData | None = None,
) -> GraphData:
    """Identities of everything the recipe reads; those that are in `before` are taken from it."""
    known = {} if before is None else before.pools
    return GraphData(
        pools={
            name: known.get(name) or _identity(pools, name)
            for name in {*pools.names, *recipe.pools_read()}
        },
        evals=before.evals
        if before is not None
        else {name: identify(items.problems, items.labels) for name, items in evals.items()},
        verifier_code=verifier_code(recipe.task.verifier),
        source_files=rollout_files(recipe)
        | {
            spec.source: files
            for spec in recipe.models.values()
            if (files := source_files(spec.source)) is not None
        },
    )


def _identity(pools: Pools, name: str) -> DataIdentity:
    labels = () if name.partition(":")[0] == "prompts" else pools.labels(name)
    return identify(pools[name], labels)


def _first(name: str, data: LabelledProblems, evaluation: Evaluation) -> LabelledProblems:
    """The first `evaluation.problems` of a set in a seeded order that is the set's own."""
    count = evaluation.problems
    if count is None or count >= len(data.problems):
        return data
    order = generator(0, "evaluation", name).permutation(len(data.problems))
    chosen = {data.problems[index].id for index in order[:count]}
    return data.only(lambda problem: problem.id in chosen)


def check_prompt(recipe: Recipe, train: LabelledProblems) -> None:
    """Whether the prompt asks for the answer in a form the verifier reads."""
    task = recipe.task
    check_answers(task.verifier, task.train, train.labels)
    with make_verifier(
        task.verifier,
        timeout_seconds=task.verifier_timeout_seconds,
        correct_from=task.verifier_correct_from,
    ) as verifier:
        if not reads_rows(task.verifier):
            accepted = accepts_examples(verifier, task.prompt, train.labels)
            check_prompt_matches_verifier(task.prompt, verifier.reads, verifier.name, accepted)


def check_solutions(study: Study) -> None:
    """Whether every pool that sft reads has worked solutions."""
    checked = set()
    for node in study.graph.nodes.values():
        if node.kind != "sft" or node.pool in checked:
            continue
        checked.add(node.pool)
        for label in study.labels_of(node) or ():
            if label.solution is None:
                raise InputError(
                    f"{study.graph.describe(node.fingerprint)}: problem {label.problem_id!r} has "
                    "no worked solution; set pools.worked, use data with solutions, or leave out "
                    "sft"
                )


def _contamination_rows(found: ContaminationReport) -> tuple[Mapping[str, str], ...]:
    return tuple(
        {
            "train_id": match.train_id,
            "eval_set": match.eval_set,
            "eval_id": match.eval_id,
            "kind": match.kind,
            "action": action,
        }
        for action, matches in (("removed", found.removed), ("kept", found.near))
        for match in matches
    )


def _warnings(found: ContaminationReport) -> tuple[str, ...]:
    if not found.near:
        return ()
    return (
        f"{len(found.near)} training problems resemble evaluation problems (half of their word "
        "8-grams or more) and were kept; see contamination in results.json",
    )
