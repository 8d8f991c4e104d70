"""One run of a study: prepare, execute what is not there yet, and say what came of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headwater.config.loading import write_resolved
from headwater.config.recipe import Recipe
from headwater.errors import BudgetExhausted, InputError, StageError
from headwater.ledger import Ledger
from headwater.models.config_file import read_config
from headwater.models.size import model_configs
from headwater.models.source_names import SourceKind, describe_source
from headwater.stages.alerts import read_alerts
from headwater.stages.job import StageJob
from headwater.storage import disk_errors
from headwater.tracking.view import tell_results, tracked
from headwater.types import Problem
from headwater.workflow.accounts import settle_accounts
from headwater.workflow.callbacks import Callback, with_callbacks
from headwater.workflow.confinement import require_own_files
from headwater.workflow.disk_need import disk_need, published
from headwater.workflow.executor import Executor
from headwater.workflow.graph import STAGE_VERSIONS, Graph, StageNode, sampling_of
from headwater.workflow.identities import own_code_warnings
from headwater.workflow.launch import Launch, launch_worker, launched_rank
from headwater.workflow.messages import StageTask, WorkerSetup
from headwater.workflow.outcome import RunOutcome, load_outcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView, make_view
from headwater.workflow.ray_executor import RayExecutor
from headwater.workflow.readings import readings_of
from headwater.workflow.record import LEDGER_FILE, RUN_FILE, record_of, write_record
from headwater.workflow.recorded_data import unchanged_data
from headwater.workflow.store import ArtifactStore, run_lock
from headwater.workflow.study import Study

RECIPE_FILE = "recipe.yaml"
_MOST_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class WorkerFunctions:
    """What workers call, as "module:function".

    run_stage(job, context) runs a stage; check_tokenizers(student folder, teacher folder) raises
    InputError for two models that cannot be bridged, check_context(folder, model's name, prompt
    form, readings) for a model that cannot read what the study asks of it, check_devices(compute,
    ranks) for ranks that find no GPU here, and check_vllm() where vLLM is not installed beside us.
    """

    run_stage: str = "headwater.workflow.registry:run_stage"
    check_tokenizers: str = "headwater.models.compatibility:check_same_tokenizer"
    check_context: str = "headwater.models.context_length:check_context"
    check_devices: str = "headwater.engine.precision:check_devices"
    check_vllm: str = "headwater.rollout.vllm_local:check_installed"


def run_recipe(
    recipe: Recipe,
    out_dir: Path,
    *,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    quiet: bool = False,
    strict: bool = False,
    ray: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunOutcome:
    """Run a recipe in `out_dir`, or continue it there; what is published is not run again.

    strict: what is otherwise warned of is an error: InputError for what is known before training,
    StageError for an alert of a stage, which is saved first. ray: the cluster whose tasks the
    stages are ("auto", "local" or HOST:PORT) instead of processes of this machine. callbacks: told
    what happens; one that returns True stops the run as Ctrl-C does.

    A budget that ends the run early is in the outcome's `stopped`. Raises InputError before
    anything is trained, StageError for a stage that failed, and Interrupted once Ctrl-C has
    been answered by saving every stage in hand.
    """
    study = prepare_study(recipe, seeds=seeds, arms=arms)
    view = with_callbacks(make_view(study.graph, quiet=quiet), callbacks)
    return run_study(study, out_dir, view=view, strict=strict, ray=ray)


def run_study(
    study: Study,
    out_dir: Path,
    *,
    view: ProgressView,
    functions: WorkerFunctions = WorkerFunctions(),
    strict: bool = False,
    launch: Launch = launch_worker,
    ray: str | None = None,
) -> RunOutcome:
    """Run a prepared study.

    functions: what workers call; launch: how their processes are started. strict, ray and errors:
    as of `run_recipe`, and InputError where `out_dir` was begun with other content of a source.
    """
    need = disk_need(study, published(study, out_dir), workforce(study.recipe)[0])
    disk = need.warning(out_dir)
    known = [*study.warnings, *([disk] if disk else [])]
    if strict and known:
        raise InputError(
            "\n".join(f"{warning}; --strict takes this for an error" for warning in known)
        )
    if disk:
        view.say(f"warning: {disk}")
    require_own_files(out_dir)
    view = tracked(view, study.recipe, out_dir)
    with disk_errors(out_dir), run_lock(out_dir):
        data = unchanged_data(study.sources, out_dir / RUN_FILE)
        write_resolved(study.recipe, out_dir / RECIPE_FILE)
        write_record(record_of(study, workforce(study.recipe)[1], data), out_dir)
        stopped = run_stages(
            study,
            out_dir,
            view=view,
            functions=functions,
            strict=strict,
            launch=launch,
            ray=ray,
        )
        outcome = load_outcome(out_dir, stopped)
        tell_results(view, outcome)
        return outcome


def run_stages(
    study: Study,
    out_dir: Path,
    *,
    view: ProgressView,
    functions: WorkerFunctions = WorkerFunctions(),
    strict: bool = False,
    launch: Launch = launch_worker,
    ray: str | None = None,
) -> BudgetExhausted | None:
    """Run the stages that a study's graph has and `out_dir`, which the caller has locked, lacks.

    Says nothing of the study in the folder. Arguments, errors: as of `run_study`. Returns the
    budget that ended the run early.
    """
    store = ArtifactStore(out_dir)
    store.tidy()
    processes, threads = workforce(study.recipe)
    setup = WorkerSetup(
        run_dir=out_dir.resolve(),
        run_stage=functions.run_stage,
        verifier=study.recipe.task.verifier,
        verifier_workers=study.recipe.task.verifier_workers,
        verifier_timeout_seconds=study.recipe.task.verifier_timeout_seconds,
        verifier_correct_from=study.recipe.task.verifier_correct_from,
        limits=study.recipe.budget.limits(),
        stages=tuple(study.graph.nodes),
        threads=threads,
        strict=strict,
        deterministic=study.recipe.compute.deterministic,
        ranks=ranks_of(study.recipe),
        retries=study.recipe.compute.retries or 0,
        every_step=view.every_step,
    )
    for warning in own_code_warnings(study.recipe.task.verifier):
        view.say(f"warning: {warning}")
    task_of = partial(make_task, study, store)
    executing: Executor | RayExecutor
    if ray is None:
        executing = Executor(study.graph, setup, processes, task_of, view, launch)
    else:
        compute = study.recipe.compute
        most = compute.processes
        executing = RayExecutor(study.graph, setup, most, task_of, view, ray, compute)
    with view, executing as executor:
        published = _sound(study.graph, store, view)
        with Ledger(out_dir / LEDGER_FILE) as ledger:
            settle_accounts(ledger, study.graph, store, published, view.say)
        return _execute(study, store, executor, functions, published, strict)


def workforce(recipe: Recipe) -> tuple[int, int]:
    """(worker processes, threads of each, and of each of its ranks). Threads never depend on the
    number of processes, since they can show in the last bits of a sum."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tiny = all(
        describe_source(spec.source).kind in (SourceKind.TINY, SourceKind.PRUNE)
        for spec in recipe.models.values()
    )
    ranks = ranks_of(recipe)
    at_once = max(1, min(cpus // ranks, _MOST_PROCESSES)) if tiny else 1
    processes = 1 if launched_rank() is not None else recipe.compute.processes or at_once
    return processes, recipe.compute.threads or (1 if tiny else max(1, cpus // ranks))


def ranks_of(recipe: Recipe) -> int:
    """Processes that run each stage together: as torchrun started them, or as the recipe says."""
    started = launched_rank() is not None
    return int(os.environ["WORLD_SIZE"]) if started else recipe.compute.ranks


def ranks_here(recipe: Recipe) -> int:
    """Those of `ranks_of` that are on this machine."""
    ranks = ranks_of(recipe)
    return ranks if launched_rank() is None else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def make_task(study: Study, store: ArtifactStore, fingerprint: str) -> StageTask:
    """The task of one stage whose parents are published."""
    node = study.graph.nodes[fingerprint]
    recipe = study.recipe

    def model_of(parent: str | None) -> Path | None:
        return None if parent is None else store.path(parent).resolve() / "model"

    problems: tuple[Problem, ...] = study.problems_of(node)
    job = StageJob(
        kind=node.kind,
        config=node.settings(),
        fingerprint=fingerprint,
        seed=node.seed,
        stream=node.stream,
        problems=problems,
        prompt_form=recipe.task.prompt,
        sampling=sampling_of(node, recipe),
        compute=recipe.compute,
        guards=recipe.guards,
        output_dir=store.staging_dir(fingerprint).resolve(),
        checkpoint_dir=store.checkpoint_dir(fingerprint).resolve(),
        model_dir=model_of(node.model),
        teacher_dir=model_of(node.teacher),
        base_dir=model_of(node.base),
        rollouts_dir=None if node.rollouts is None else store.path(node.rollouts).resolve(),
        teachers={
            source: path
            for source, one in node.teachers.items()
            if (path := store.path(one).resolve() if node.rollouts else model_of(one))
        },
        options=node.options,
    )
    problem_set = f"eval:{node.eval_set}" if node.eval_set is not None else node.pool
    return StageTask(
        job=job,
        description=study.graph.describe(fingerprint),
        facts=_facts(node),
        labels=study.labels_of(node),
        problem_set=f"{problem_set} of {node.sources}" if node.sources else problem_set,
    )


def _facts(node: StageNode) -> dict[str, object]:
    """What the manifest says of a stage, so that every number can be traced."""
    return {
        "kind": node.kind,
        "version": STAGE_VERSIONS[node.kind],
        "parents": list(node.parents),
        "config": dict(node.config),
        "seed": node.seed,
        "stream": node.stream,
        "pool": node.pool,
        "eval_set": node.eval_set,
        "model_name": node.model_name,
    }


def _execute(
    study: Study,
    store: ArtifactStore,
    executor: Executor | RayExecutor,
    functions: WorkerFunctions,
    published: set[str],
    strict: bool,
) -> BudgetExhausted | None:
    """Sources first, so that models are checked before anything is trained; then the rest."""
    graph = study.graph
    executor.view.found(len(published))
    if strict:
        _refuse_alerts(graph, store, published)
    compute, ranks = study.recipe.compute, ranks_here(study.recipe)
    wants_gpus = compute.device == "cuda" or compute.cpu_offload or ranks > 1
    if wants_gpus and isinstance(executor, Executor) and not published.issuperset(graph.nodes):
        executor.call(functions.check_devices, compute, ranks)
    if compute.engines_here and not published.issuperset(graph.nodes):
        executor.call(functions.check_vllm)
    sources = [f for f, node in graph.nodes.items() if node.kind == "source" and not node.parents]
    executor.run(sources, published)
    _check_layers(study, store, sources)
    for pair in _tokenizer_pairs(graph):
        student, teacher = (store.path(source).resolve() / "model" for source in pair)
        executor.call(functions.check_tokenizers, student, teacher)
    for source, readings in readings_of(study, published).items():
        name = f"model {graph.nodes[source].model_name}"
        model_dir = store.path(source).resolve() / "model"
        executor.call(functions.check_context, model_dir, name, study.recipe.task.prompt, readings)
    return executor.run(graph.nodes, published)


def _refuse_alerts(graph: Graph, store: ArtifactStore, published: Collection[str]) -> None:
    for fingerprint in graph.nodes:
        alerts = read_alerts(store.path(fingerprint)) if fingerprint in published else ()
        if alerts:
            raise StageError(
                f"{graph.describe(fingerprint)}: finished with an alert: {alerts[0].words}. "
                "--strict takes this for an error: run again without --strict to go on, or with "
                "other settings"
            )


def _check_layers(study: Study, store: ArtifactStore, sources: Sequence[str]) -> None:
    """Whether parents that were only just fetched have the layers to be kept of them."""
    models = study.recipe.models
    if all(spec.layers is None for spec in models.values()):
        return
    configs = {
        study.graph.nodes[source].config["source"]: read_config(store.path(source) / "model")
        for source in sources
    }
    model_configs(models, configs)


def _sound(graph: Graph, store: ArtifactStore, view: ProgressView) -> set[str]:
    """Stages that are published and intact; damaged ones are named and removed."""
    published = set()
    for fingerprint in graph.nodes:
        if not store.path(fingerprint).is_dir():
            continue
        damage = store.find_damage(fingerprint)
        if damage is None:
            published.add(fingerprint)
        else:
            view.say(f"{graph.describe(fingerprint)} is damaged ({damage.reason}): rebuilding it")
            store.discard(fingerprint)
    return published


def _tokenizer_pairs(graph: Graph) -> list[tuple[str, str]]:
    """(student's, teacher's) root sources of every arm that has both and where they differ."""
    pairs = {
        (graph.root(plan.student), graph.root(teacher))
        for plan in graph.arms
        for teacher in (plan.teacher, *plan.teachers.values())
        if plan.student is not None and teacher is not None
    }
    return sorted(pair for pair in pairs if pair[0] != pair[1])
