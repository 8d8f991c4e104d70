"""A recipe made ready: data read, decontaminated, divided, checked; nothing trained yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headwater.config.recipe import Evaluation, Recipe
from headwater.errors import InputError
from headwater.models.size import model_configs
from headwater.models.source_names import require_available
from headwater.seeding import generator
from headwater.tasks.contamination import ContaminationReport, remove_contaminated
from headwater.tasks.pools import Pools, make_pools
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.tasks.prompts import check_prompt_matches_verifier
from headwater.types import Label, Problem
from headwater.verify.verifiers import accepts_examples, make_verifier
from headwater.workflow.contrasts import check_contrasts
from headwater.workflow.graph import NEEDS_VAULT, Graph, StageNode
from headwater.workflow.identities import source_files, verifier_code
from headwater.workflow.planner import DataIdentity, GraphData, build_graph, identify

#: An evaluation set that is a pool of the training source.
_POOL = "pool:"


@dataclass(frozen=True)
class Study:
    """Everything a run needs to know before its first stage.

    contamination: one row for each training problem that was found in an evaluation set.
    """

    recipe: Recipe
    graph: Graph
    pools: Pools = field(repr=False)
    evals: Mapping[str, LabelledProblems] = field(repr=False)
    contamination: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def problems_of(self, node: StageNode) -> tuple[Problem, ...]:
        """What a stage asks: its evaluation set or pool; nothing for a stage without either."""
        if node.eval_set is not None:
            return self.evals[node.eval_set].problems
        return self.pools[node.pool] if node.pool is not None else ()

    def labels_of(self, node: StageNode) -> tuple[Label, ...] | None:
        """What the stage's label vault holds; None for a stage that may not see a label."""
        if node.kind not in NEEDS_VAULT:
            return None
        if node.eval_set is not None:
            return self.evals[node.eval_set].labels
        return self.pools.labels(node.pool) if node.pool is not None else ()

    def pool_sizes(self) -> dict[str, int]:
        """Number of problems in every pool and evaluation set."""
        sizes = {name: len(self.pools[name]) for name in self.pools.names}
        return sizes | {f"eval:{name}": len(data) for name, data in self.evals.items()}


def prepare_study(
    recipe: Recipe, *, seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None
) -> Study:
    """Read and check everything a recipe names, without torch and without training.

    Raises InputError for data, pools, models, prompts or arms that cannot work.
    """
    check_contrasts(recipe)
    for spec in recipe.models.values():
        require_available(spec.source)
    model_configs(recipe.models)  # layers that a parent does not have
    task, sizes = recipe.task, recipe.pools
    outside = {
        name: _load(source, task.columns)
        for name, source in task.eval.items()
        if not source.startswith(_POOL)
    }
    train, found = remove_contaminated(_load(task.train, task.columns), outside)
    worked = None
    if task.worked is not None:
        worked, found_too = remove_contaminated(_load(task.worked, None), outside)
        found = found.with_other(found_too)
    pools = make_pools(
        train,
        labels=sizes.labels,
        split=sizes.split,
        prompts=sizes.prompts,
        worked=sizes.worked,
        validation=sizes.validation,
        seed=sizes.seed,
        worked_data=worked,
    )
    evals = {
        name: _first(
            name,
            pools.labelled(source.removeprefix(_POOL))
            if source.startswith(_POOL)
            else outside[name],
            recipe.evaluation,
        )
        for name, source in task.eval.items()
    }
    _check_prompt(recipe, train)
    data = GraphData(
        pools={name: _identity(pools, name) for name in pools.names},
        evals={name: identify(items.problems, items.labels) for name, items in evals.items()},
        verifier_code=verifier_code(task.verifier),
        source_files={
            spec.source: files
            for spec in recipe.models.values()
            if (files := source_files(spec.source)) is not None
        },
    )
    graph = build_graph(recipe, data, seeds=seeds, arms=arms)
    study = Study(recipe, graph, pools, evals, _contamination_rows(found), _warnings(found))
    _check_solutions(study)
    return study


def _load(source: str, columns: Mapping[str, str] | None) -> LabelledProblems:
    """Columns are about files and hub datasets; an embedded task has none."""
    return load_problems(source, None if source.startswith("task:") else columns)


def _identity(pools: Pools, name: str) -> DataIdentity:
    labels = () if name == "prompts" else pools.labels(name)
    return identify(pools[name], labels)


def _first(name: str, data: LabelledProblems, evaluation: Evaluation) -> LabelledProblems:
    """The first `evaluation.problems` of a set in a seeded order that is the set's own."""
    count = evaluation.problems
    if count is None or count >= len(data.problems):
        return data
    order = generator(0, "evaluation", name).permutation(len(data.problems))
    chosen = {data.problems[index].id for index in order[:count]}
    return data.only(lambda problem: problem.id in chosen)


def _check_prompt(recipe: Recipe, train: LabelledProblems) -> None:
    """Whether the prompt asks for the answer in a form the verifier reads."""
    task = recipe.task
    with make_verifier(task.verifier, timeout_seconds=task.verifier_timeout_seconds) as verifier:
        accepted = accepts_examples(verifier, task.prompt, train.labels)
        check_prompt_matches_verifier(task.prompt, verifier.reads, verifier.name, accepted)


def _check_solutions(study: Study) -> None:
    """Whether every pool that sft reads has worked solutions."""
    for node in study.graph.nodes.values():
        if node.kind != "sft":
            continue
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
