"""Arguments and options of the command line that several verbs have, or that take many words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli import completion

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe.",
        autocompletion=completion.recipes,
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="The folder of a run.", autocompletion=completion.runs),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a.b=value; repeatable.",
        autocompletion=completion.set_keys,
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Lay this profile of the recipe over it.",
        autocompletion=completion.profiles,
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default runs/NAME.")
]
SeedsOption = Annotated[
    str | None, typer.Option("--seeds", metavar="0,1,2", help="Instead of the recipe's seeds.")
]
ArmsOption = Annotated[
    str | None,
    typer.Option("--arms", metavar="x,y", help="Only these arms.", autocompletion=completion.arms),
]
VerifierOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="math, exact, reasoning_gym, python:module:function or reward:module:function.",
        autocompletion=completion.choices("math", "exact", "reasoning_gym"),
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress: only the result, and errors.")
]
NprocOption = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        metavar="N",
        min=1,
        help="Processes that share each stage, a GPU each; sets compute.ranks.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Stages on a Ray cluster: auto, local or HOST:PORT."
    ),
]
ReportToOption = Annotated[
    str | None,
    typer.Option(
        "--report-to",
        metavar="x,y",
        help="Trackers: tensorboard, wandb, trackio, mlflow; sets report_to.",
    ),
]
