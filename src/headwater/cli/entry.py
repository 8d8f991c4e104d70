"""Running the command: every error one line, and an exit code.

Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 a budget stopped the run, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import cast

import typer

from headwater.cli import evaluating, machine, pilot, publishing, study
from headwater.cli.app import app
from headwater.errors import HeadwaterError
from headwater.redaction import redact
from headwater.visible import one_line, visible

#: The modules with the verbs, in the order in which `--help` lists them.
VERBS = (study, pilot, evaluating, publishing, machine)

# Wrong arguments, under whichever name this version of typer has for them.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code.

    Every error becomes one line on stderr; HEADWATER_DEBUG=1 shows the traceback as well.
    """
    try:
        code = app(args=argv, prog_name="headwater", standalone_mode=False)
    except HeadwaterError as error:
        code = _failed(str(error), error.exit_code)
    except _UsageError as error:
        code = _failed(_in_words(error), 2)
    except typer.Abort:
        code = 130
    except OSError as error:  # a full disk, a folder that may not be written
        code = 1 if isinstance(error, BrokenPipeError) else _failed(str(error), 1)
    except Exception as error:  # the process boundary: whatever is left is a defect of ours
        kind = type(error).__name__
        code = _failed(f"{kind}: {error}; this is a defect: HEADWATER_DEBUG=1 shows where", 1)
    sys.exit(code)


def _in_words(error: typer.BadParameter) -> str:
    """What is wrong with the arguments, a near name, and which help says more."""
    message = error.format_message().rstrip(".")
    message = re.sub(r" \(Possible options: (.+)\)$", r"; did you mean \1?", message)
    message = re.sub(r"\. Did you mean (.+)\?$", r"; did you mean \1?", message)
    command = error.ctx.command_path if error.ctx is not None else "headwater"
    return f"{message}{'' if message.endswith('?') else ';'} see `{command} --help`"


def _failed(message: str, code: int) -> int:
    if os.environ.get("HEADWATER_DEBUG"):
        typer.echo(visible(redact(traceback.format_exc())), err=True)
    for line in redact(message).split("\n"):
        typer.echo(f"headwater: {one_line(line)}", err=True)
    return code
