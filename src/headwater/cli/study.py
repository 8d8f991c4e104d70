"""The verbs of a study: run, plan, report, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headwater import api, console
from headwater.cli.app import app, names, numbers, print_result, stdout
from headwater.cli.options import (
    ArmsOption,
    JsonOption,
    NprocOption,
    OutOption,
    ProfileOption,
    RayOption,
    RecipeArgument,
    ReportToOption,
    RunArgument,
    SeedsOption,
    SetOption,
)
from headwater.errors import InputError


@app.command()
def run(
    recipe: RecipeArgument,
    profile: ProfileOption = None,
    set_: SetOption = [],  # noqa: B006 - typer's way to write a repeatable option
    out: OutOption = None,
    seeds: SeedsOption = None,
    arms: ArmsOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A warning ends the run, with everything saved.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Sets compute.deterministic=true.")
    ] = False,
    nproc: NprocOption = None,
    ray: RayOption = None,
    report_to: ReportToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe's arms, evaluate, report. The same command again continues."""
    if api.follow(nproc, ray):
        return
    switches = ["compute.deterministic=true"] if deterministic else []
    switches += [f"compute.ranks={nproc}"] if nproc is not None else []
    switches += [f"report_to=[{report_to}]"] if report_to is not None else []
    result = api.run(
        recipe,
        out,
        profile=profile,
        overrides=[*set_, *switches],
        seeds=numbers(seeds),
        arms=names(arms),
        quiet=as_json,
        strict=strict,
        ray=ray,
    )
    print_result(result, console.show_report, as_json)
    if result.stopped is not None:
        raise result.stopped


@app.command()
def plan(
    recipe: RecipeArgument,
    profile: ProfileOption = None,
    set_: SetOption = [],  # noqa: B006
    out: OutOption = None,
    seeds: SeedsOption = None,
    arms: ArmsOption = None,
    mean_response: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", min=1, help="Expected response length; default the longest allowed."
        ),
    ] = None,
    gpu_memory: Annotated[
        float, typer.Option(metavar="GIB", min=1, help="Memory of one GPU (compute.device: cuda).")
    ] = 80.0,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="The cluster's GPUs; default as few as each stage fits on."
        ),
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs of one node of the cluster.")
    ] = 8,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured constants (benchmarks/calibrate.py)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would do and cost, without training anything."""
    result = api.plan(
        recipe,
        out,
        profile=profile,
        overrides=set_,
        seeds=numbers(seeds),
        arms=names(arms),
        mean_response=mean_response,
        gpu_memory_gib=gpu_memory,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        calibration=calibration,
    )
    print_result(result, console.show_plan, as_json)


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Rebuild report.html, results.json and the tables of a run."""
    print_result(api.report(run), console.show_report, as_json)


@app.command()
def samples(
    run: RunArgument,
    arm: Annotated[str | None, typer.Option(help="Only this arm.")] = None,
    stage: Annotated[str | None, typer.Option(help="A kind, or a stage's fingerprint.")] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="How many under a heading.")
    ] = 4,
    table: Annotated[
        bool,
        typer.Option("--table", help="A training step as a table, with reward and advantage."),
    ] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of --table; default the last step kept.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read what the models of a run wrote."""
    if table:
        tables = api.completions(run, arm=arm, stage=stage, step=step, count=count)
        print_result(tables, console.show_completions, as_json)
    elif step is not None:
        raise InputError(f"--step {step} without --table; it chooses the step of the table: add it")
    elif as_json:
        found = api.samples(run, arm=arm, stage=stage, count=count)
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        console.show_samples(stdout(), run, arm=arm, stage=stage, count=count)
