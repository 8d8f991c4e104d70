"""The command and what its verbs share: printing a result, reading lists. No other logic."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console

from headwater import __version__
from headwater.errors import InputError
from headwater.terminal import stdout_console

app = typer.Typer(
    name="headwater",
    help="Post-train small models with few labels, and prove where the labels did most good.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _without_a_verb(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"headwater {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


class Result(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


_R = TypeVar("_R", bound=Result)


def print_result(result: _R, show: Callable[[Console, _R], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        show(stdout_console(), result)


def numbers(text: str | None) -> list[int] | None:
    """`0,1,2` as numbers; None for none given."""
    given = names(text)
    if given is None:
        return None
    if not given or not all(name.removeprefix("-").isdecimal() for name in given):
        raise InputError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2")
    return [int(name) for name in given]


def names(text: str | None) -> list[str] | None:
    """`x,y` as a list; None for none given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
