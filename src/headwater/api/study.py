"""The verbs of a study: load, run, plan, report, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.api.records import Completions, RunReport, Samples
from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe
    from headwater.workflow.callbacks import Callback
    from headwater.workflow.estimate import Plan
    from headwater.workflow.outcome import RunOutcome


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
    callbacks: Sequence[Callback] = (),
) -> RunReport:
    """Run a recipe, or continue it, and write its results and page.

    out: the run's folder, default runs/NAME. strict: warnings are errors, raised before training
    or once the stage that warns is saved. ray: run the stages on this Ray cluster ("auto", "local"
    or HOST:PORT). callbacks: functions told each `Event` in this process; one that returns True
    stops the run, as Ctrl-C does. A budget that ended the run early is in the
    report's `stopped`, and what was finished is reported. Raises InputError before anything
    is trained, StageError for a stage that failed, Interrupted after Ctrl-C.
    """
    from headwater.workflow.run import run_recipe

    loaded = load(recipe, overrides, profile)
    outcome = run_recipe(
        loaded,
        run_folder(loaded, out),
        seeds=seeds,
        arms=arms,
        quiet=quiet,
        strict=strict,
        ray=ray,
        callbacks=callbacks,
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
    from headwater.workflow.disk_need import disk_need, published
    from headwater.workflow.estimate import estimate
    from headwater.workflow.prepare import prepare_study
    from headwater.workflow.run import workforce

    loaded = load(recipe, overrides, profile)
    study = prepare_study(loaded, seeds=seeds, arms=arms, planning=True)
    folder = run_folder(loaded, out)
    cached = published(study, folder)
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
    found = estimate(study, machine, cached, mean_response=mean_response)
    disk = disk_need(study, cached, machine.processes)
    told = disk.warning(folder)
    warnings = (*found.warnings, told) if told else found.warnings
    return replace(found, disk_bytes=disk.total, warnings=warnings)


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


def completions(
    run_dir: str | Path,
    *,
    arm: str | None = None,
    stage: str | None = None,
    step: int | None = None,
    count: int = 4,
) -> Completions:
    """Completions of a training step of each stage that samples, with reward and advantage.

    arm: only this arm's; stage: a kind, or the beginning of a fingerprint; step: from 1, by default
    the last one kept. A run that goes on may be read. Raises InputError when nothing matches.
    """
    from headwater.report.completions import completion_tables

    found = completion_tables(Path(run_dir), arm=arm, stage=stage, step=step, count=count)
    return Completions(tuple(found))


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a recipe runs: `out`, or runs/NAME."""
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
