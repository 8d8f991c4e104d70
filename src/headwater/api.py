"""The verbs of the command line, for Python. Each returns a record; none prints.

Importing this module loads neither torch nor transformers: every verb imports what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.comparison.compare import OnBatch
    from headwater.comparison.record import Comparison
    from headwater.comparison.settings import EvaluationSettings
    from headwater.config.recipe import Recipe
    from headwater.doctor import Check
    from headwater.errors import BudgetExhausted
    from headwater.recipes import ShippedRecipe
    from headwater.report.results import Results
    from headwater.report.samples import ReadRollout
    from headwater.tasks.contamination_check import ContaminationCheck
    from headwater.verify.cases import CaseResult
    from headwater.workflow.estimate import Plan
    from headwater.workflow.outcome import RunOutcome


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run found and where it is written; `stopped` is the budget that ended it early."""

    run_dir: Path
    results: Results
    results_path: Path
    page_path: Path
    stopped: BudgetExhausted | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": str(self.run_dir),
            "results_path": str(self.results_path),
            "page_path": str(self.page_path),
            "stopped": None if self.stopped is None else str(self.stopped),
            "results": self.results.model_dump(mode="json", by_alias=True),
        }


@dataclass(frozen=True, slots=True)
class Samples:
    """Rollouts of a run under headings."""

    groups: tuple[tuple[str, tuple[ReadRollout, ...]], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "groups": [
                {"heading": heading, "rollouts": [asdict(rollout) for rollout in rollouts]}
                for heading, rollouts in self.groups
            ]
        }


@dataclass(frozen=True, slots=True)
class VerifiedCases:
    """A verdict for each row of a case file."""

    rows: tuple[CaseResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"cases": list(self.rows)}

    def json_lines(self) -> str:
        """One JSON object a line."""
        return "".join(f"{json.dumps(row)}\n" for row in self.rows)

    def write(self, path: Path) -> None:
        """Write `json_lines` to a file, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.json_lines(), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing keeps headwater from working."""
        return all(check.health != "problem" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"healthy": self.healthy, "checks": [check.as_dict() for check in self.checks]}


@dataclass(frozen=True, slots=True)
class RecipeListing:
    """The shipped recipes, or the copy that was made of one."""

    recipes: tuple[ShippedRecipe, ...]
    copied_to: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        copied = None if self.copied_to is None else str(self.copied_to)
        return {"recipes": [recipe.as_dict() for recipe in self.recipes], "copied_to": copied}


def load(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), profile: str | None = None
) -> Recipe:
    """A recipe from a file, the name of a shipped one, or as it is.

    profile: one of the file's `profiles`. overrides: `a.b=value` strings. Raises InputError
    listing every problem of the file.
    """
    from headwater.config.loading import load_recipe
    from headwater.config.recipe import Recipe
    from headwater.recipes import find_recipe

    if isinstance(recipe, Recipe):
        if overrides or profile is not None:
            raise InputError(
                "overrides and profile change a file's values; use recipe.model_copy instead"
            )
        return recipe
    return load_recipe(find_recipe(recipe), overrides, profile)


def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    quiet: bool = False,
    strict: bool = False,
    ray: str | None = None,
) -> RunReport:
    """Run a recipe, or continue it, and write its results and page.

    out: the run's folder, default runs/NAME. strict: warnings are errors, raised before training
    or once the stage that warns is saved. ray: run the stages on this Ray cluster ("auto", "local"
    or HOST:PORT). A budget that ended the run early is in the
    report's `stopped`, and what was finished is reported. Raises InputError before anything
    is trained, StageError for a stage that failed, Interrupted after Ctrl-C.
    """
    from headwater.workflow.run import run_recipe

    loaded = load(recipe, overrides, profile)
    outcome = run_recipe(
        loaded,
        _run_dir(loaded, out),
        seeds=seeds,
        arms=arms,
        quiet=quiet,
        strict=strict,
        ray=ray,
    )
    return _write_report(outcome)


def follow(nproc: int | None = None, ray: str | None = None) -> bool:
    """Serve as one of the ranks that torchrun started, where this process is one but not the main.

    nproc, ray: what else was to start ranks. Returns whether it was, once the main rank's run is
    over: there is nothing left to do then. Raises InputError, on all ranks, where torchrun is not
    the only one to start them.
    """
    from headwater.workflow.launch import launched_rank, require_one_launcher
    from headwater.workflow.rank import follow

    require_one_launcher(nproc, ray)
    if not launched_rank():
        return False
    follow()
    return True


def plan(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    mean_response: int | None = None,
    gpu_memory_gib: float = 80.0,
    gpus: int | None = None,
    gpus_per_node: int = 8,
    calibration: str | Path | None = None,
) -> Plan:
    """What `run` with the same arguments would do and cost; reads the data, trains nothing.

    Hub datasets that cannot be reached are stood in for by as many problems as the recipe asks
    for, with a warning. mean_response: tokens of a response, the longest allowed by default.
    gpu_memory_gib, gpus, gpus_per_node: for compute.device: cuda, one GPU's memory, the cluster's
    GPUs (by default as few as the largest stage fits on) and those of a node. calibration: a file
    of measured constants (benchmarks/calibrate.py). Raises InputError for whatever else `run`
    would refuse.
    """
    from headwater.workflow.calibration import calibrated, default_calibration
    from headwater.workflow.cost import Machine
    from headwater.workflow.devices import Offer
    from headwater.workflow.estimate import estimate
    from headwater.workflow.prepare import prepare_study
    from headwater.workflow.run import workforce

    loaded = load(recipe, overrides, profile)
    study = prepare_study(loaded, seeds=seeds, arms=arms, planning=True)
    artifacts = _run_dir(loaded, out) / "artifacts"
    cached = {name for name in study.graph.nodes if (artifacts / name).is_dir()}
    device = "cuda" if loaded.compute.device == "cuda" else "cpu"
    rates = default_calibration(device)
    if calibration is not None:
        rates = calibrated(Path(calibration), rates)
    offer = Offer(
        memory_bytes=int(gpu_memory_gib * 2**30),
        count=gpus,
        per_node=gpus_per_node,
        rates=rates,
        compute=loaded.compute,
        verifier_workers=loaded.task.verifier_workers,
        value_bytes=4 if loaded.compute.precision == "float32" else 2,
    )
    machine = Machine(device, *workforce(loaded), offer)
    return estimate(study, machine, cached, mean_response=mean_response)


def evaluate(
    models: Sequence[str],
    settings: EvaluationSettings,
    out: str | Path | None = None,
    *,
    on_batch: OnBatch | None = None,
) -> Comparison:
    """avg@k, pass@k and maj@k of models on sets of problems, and the difference of every two.

    models: folders, or sources such as hf:ID. out: where every attempt is kept, by default
    runs/eval/MODEL-SET-HASH; the same call continues or reads back what is there. on_batch: told
    after each batch. Raises InputError before anything is sampled, Interrupted after Ctrl-C.
    """
    from headwater.comparison.compare import compare_models

    return compare_models(models, settings, None if out is None else Path(out), on_batch=on_batch)


def evaluation_settings(**values: Any) -> EvaluationSettings:
    """Settings of `evaluate` from plain values. Raises InputError listing what is wrong."""
    from pydantic import ValidationError

    from headwater.comparison.settings import EvaluationSettings

    try:
        return EvaluationSettings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_setting_problem(one) for one in error.errors())) from None


def _setting_problem(problem: Mapping[str, Any]) -> str:
    """A line; what a validator of ours says stands for itself."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return str(message)
    return f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {message}"


def report(run_dir: str | Path) -> RunReport:
    """Rebuild results.json and report.html from what a run folder holds.

    Raises InputError for a folder that is no run.
    """
    from headwater.workflow.outcome import load_outcome

    return _write_report(load_outcome(Path(run_dir)))


def samples(
    run_dir: str | Path, *, arm: str | None = None, stage: str | None = None, count: int = 4
) -> Samples:
    """Rollouts of a run, half of them correct where verdicts are known.

    arm: only this arm's; stage: a kind, or the beginning of a fingerprint. Raises InputError
    when nothing matches.
    """
    from headwater.report.samples import collect_samples

    found = collect_samples(Path(run_dir), arm=arm, stage=stage, number=count)
    return Samples(tuple((heading, tuple(rollouts)) for heading, rollouts in found))


def verify(
    cases: str | Path | Sequence[tuple[str, str]],
    verifier: str = "math",
    *,
    wrap_bare: bool = False,
    workers: int = 1,
    timeout_seconds: float = 5.0,
    explain: bool = False,
) -> VerifiedCases:
    """Grade (prediction, gold) pairs, or a JSON Lines file of {prediction, gold[, id, expected]}.

    wrap_bare: put predictions without any box into one. explain: say step by step what was read
    and compared. Raises InputError with file and line.
    """
    from headwater.verify.cases import run_cases

    rows = run_cases(
        Path(cases) if isinstance(cases, str | Path) else cases,
        verifier,
        wrap_bare=wrap_bare,
        workers=workers,
        timeout_seconds=timeout_seconds,
        explain=explain,
    )
    return VerifiedCases(tuple(rows))


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """`NAME=SOURCE` or `SOURCE` as name -> source. Raises InputError for a name given twice."""
    from headwater.tasks.named_sources import named_sources as read

    return read(given)


def contamination(
    train: str,
    evals: Mapping[str, str] | None = None,
    *,
    ngram_words: int = 8,
    near_share: float = 0.5,
) -> ContaminationCheck:
    """Name every training problem that is in an evaluation set: exactly, normalised, or nearly.

    train: a source of problems, or a recipe (file or shipped name), which brings its evaluation
    sets along; evals: name -> source. Raises InputError for sources that cannot be read.
    """
    from headwater.recipes import is_recipe
    from headwater.tasks.contamination_check import check_contamination

    columns: Mapping[str, str] | None = None
    if is_recipe(train):
        task = load(train).task
        pools = [name for name, source in task.eval.items() if source.startswith("pool:")]
        own = {name: source for name, source in task.eval.items() if name not in pools}
        train, evals, columns = task.train, dict(evals or own), task.columns
    return check_contamination(
        train, evals or {}, columns=columns, ngram_words=ngram_words, near_share=near_share
    )


def doctor() -> Diagnosis:
    """Examine the installation and the machine; takes about ten seconds."""
    from headwater.doctor import examine

    return Diagnosis(tuple(examine()))


def recipes(copy: str | None = None, to: Path | None = None) -> RecipeListing:
    """The shipped recipes; with `copy`, also copy the one of that name to `to`."""
    from headwater.recipes import copy_recipe, shipped_recipes

    copied_to = None if copy is None else copy_recipe(copy, to)
    return RecipeListing(tuple(shipped_recipes()), copied_to)


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    from headwater.config.loading import recipe_schema

    return recipe_schema()


def _run_dir(recipe: Recipe, out: str | Path | None) -> Path:
    return Path("runs") / recipe.name if out is None else Path(out)


def _write_report(outcome: RunOutcome) -> RunReport:
    from headwater.report.files import write_report
    from headwater.report.outcome import results_of
    from headwater.report.results import write_results
    from headwater.storage import disk_errors

    with disk_errors(outcome.run_dir):
        results = results_of(outcome)
        results_path = write_results(results, outcome.run_dir)
        page_path = write_report(results, outcome.run_dir)
    return RunReport(outcome.run_dir, results, results_path, page_path, outcome.stopped)
