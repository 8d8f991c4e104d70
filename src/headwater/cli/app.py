"""The command and what its verbs share: help, printing a result, reading lists. No other logic."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from headwater import __version__, terminal
from headwater.errors import InputError

#: Panels of `headwater --help`, in its order; others follow.
STUDY, MEASURE, MODELS, MACHINE = PANELS = ("Study", "Measure", "Models", "Machine")

_HELP_STYLES = {
    "STYLE_OPTION": terminal.NAME,
    "STYLE_SWITCH": terminal.NAME,
    "STYLE_NEGATIVE_OPTION": terminal.NAME,
    "STYLE_NEGATIVE_SWITCH": terminal.NAME,
    "STYLE_COMMANDS_TABLE_FIRST_COLUMN": terminal.NAME,
    "STYLE_TYPES": terminal.QUIET,
    "STYLE_METAVAR": terminal.QUIET,  # the former's name in older releases of typer
    "STYLE_USAGE": terminal.HEADING,
    "STYLE_HELPTEXT": "",
    "STYLE_OPTION_DEFAULT": terminal.QUIET,
    "STYLE_REQUIRED_SHORT": terminal.BAD,
    "STYLE_REQUIRED_LONG": terminal.BAD,
}


def _style_help() -> None:
    from typer import rich_utils

    for name, style in _HELP_STYLES.items():
        setattr(rich_utils, name, style)


class _Verb(TyperCommand):
    def format_help(self, *arguments: Any) -> None:
        _style_help()
        super().format_help(*arguments)


class _Verbs(TyperGroup):
    def format_help(self, *arguments: Any) -> None:
        _style_help()
        super().format_help(*arguments)

    def list_commands(self, ctx: Any) -> list[str]:
        """By panel, and within one as they were defined."""
        panels = {
            name: getattr(verb, "rich_help_panel", "") for name, verb in self.commands.items()
        }
        places = {panel: place for place, panel in enumerate(PANELS)}
        return sorted(panels, key=lambda name: places.get(panels[name], len(PANELS)))


app = typer.Typer(
    name="headwater",
    cls=_Verbs,
    help="Post-train small models with few labels, and prove where the labels did most good.",
    epilog="Start with `headwater doctor`, then `headwater run quickstart`.",
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)

_F = TypeVar("_F", bound=Callable[..., Any])


def verb(panel: str, *examples: str, name: str | None = None) -> Callable[[_F], _F]:
    """Makes a function a verb under a panel of --help, with examples of arguments below its own."""

    def register(function: _F) -> _F:
        called = f"headwater {name or function.__name__}"
        lines = (f"$ {called} {arguments}".rstrip() for arguments in examples)
        epilog = "\n".join(("Examples:", *lines))
        return app.command(name, cls=_Verb, rich_help_panel=panel, epilog=epilog)(function)

    return register


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
        show(terminal.stdout_console(), result)


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
