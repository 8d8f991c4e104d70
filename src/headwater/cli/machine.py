"""The verbs about what is installed: doctor, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headwater import api, console
from headwater.cli import completion
from headwater.cli.app import MACHINE, print_result, verb
from headwater.cli.options import JsonOption


@verb(MACHINE, "", "--json")
def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices, extras and disk, test itself, and say what to do."""
    result = api.doctor()
    print_result(result, console.show_diagnosis, as_json)
    if not result.healthy:
        raise typer.Exit(1)


@verb(MACHINE, "", "quickstart --to my-study.yaml", "--schema > recipe.schema.json")
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Copy this shipped recipe.", autocompletion=completion.shipped),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Where to; default ./NAME.yaml.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or copy one to edit."""
    if schema:
        typer.echo(json.dumps(api.schema(), indent=2))
    else:
        print_result(api.recipes(name, to), console.show_recipes, as_json)
