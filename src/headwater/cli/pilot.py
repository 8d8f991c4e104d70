"""The verb that measures before labels are spent: pilot."""

from __future__ import annotations

from typing import Annotated

import typer

from headwater import api, console
from headwater.cli.app import STUDY, print_result, verb
from headwater.cli.options import JsonOption, OutOption, ProfileOption, RecipeArgument, SetOption


@verb(STUDY, "quickstart", "mine.yaml --problems 32 --trial 0")
def pilot(
    recipe: RecipeArgument,
    profile: ProfileOption = None,
    set_: SetOption = [],  # noqa: B006 - typer's way to write a repeatable option
    out: OutOption = None,
    problems: Annotated[
        int | None,
        typer.Option(metavar="N", help="Labels to try; default 64, at most half of them."),
    ] = None,
    attempts: Annotated[
        int | None,
        typer.Option(metavar="K", help="Attempts at each; default twice the group size."),
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="GRPO steps on both models; default 8, at most a third of the recipe's; 0: none.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure both base models on a few labels, and say where the labels should go."""
    result = api.pilot(
        recipe,
        out,
        profile=profile,
        overrides=set_,
        problems=problems,
        attempts=attempts,
        trial_steps=trial,
        quiet=as_json,
    )
    print_result(result, console.show_pilot, as_json)
