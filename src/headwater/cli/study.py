"""The verbs of a study: run, plan, report, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headwater import api, console
from headwater.cli import completion
from headwater.cli.app import STUDY, names, numbers, print_result, verb
from headwater.cli.options import (
    ArmsOption,
    JsonOption,
    NprocOption,
    OutOption,
    ProfileOption,
    QuietOption,
    RayOption,
    RecipeArgument,
    ReportToOption,
    RunArgument,
    SeedsOption,
    SetOption,
)
from headwater.errors import InputError
from headwater.terminal import stdout_console


@verb(
    STUDY,
    "quickstart",
    "quickstart --arms cold_grpo,bridge --seeds 0,1",
    "quickstart --set stages.grpo.steps=9 --out runs/short -q",
)
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
    quiet: QuietOption = False,
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
        quiet=quiet or as_json,
        strict=strict,
        ray=ray,
    )
    print_result(result, console.show_report, as_json)
    if result.stopped is not None:
        raise result.stopped


@verb(STUDY, "quickstart", "qwen3-1.7b --profile fast --gpus 8")
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


@verb(STUDY, "runs/quickstart", "runs/quickstart --json")
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Rebuild report.html, results.json and the tables of a run."""
    print_result(api.report(run), console.show_report, as_json)


@verb(STUDY, "runs/quickstart", "runs/quickstart --arm bridge -n 2")
def samples(
    run: RunArgument,
    arm: Annotated[
        str | None, typer.Option(help="Only this arm.", autocompletion=completion.arms)
    ] = None,
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
        console.show_samples(stdout_console(), run, arm=arm, stage=stage, count=count)
