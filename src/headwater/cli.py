"""The `headwater` command: reads arguments, calls `headwater.api`, prints. No other logic.

Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 a budget stopped the run, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast

import typer
from rich.console import Console

from headwater import __version__, api, console
from headwater.errors import HeadwaterError, InputError
from headwater.options import (
    ArmsOption,
    JsonOption,
    NprocOption,
    OutOption,
    ProfileOption,
    RayOption,
    RecipeArgument,
    RunArgument,
    SeedsOption,
    SetOption,
    VerifierOption,
)
from headwater.redaction import redact
from headwater.visible import one_line, visible

app = typer.Typer(
    name="headwater",
    help="Post-train small models with few labels, and prove where the labels did most good.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
        code = _failed(f"{error.format_message().rstrip('.')}; see `headwater --help`", 2)
    except typer.Abort:
        code = 130
    except OSError as error:  # a full disk, a folder that may not be written
        code = 1 if isinstance(error, BrokenPipeError) else _failed(str(error), 1)
    except Exception as error:  # the process boundary: whatever is left is a defect of ours
        kind = type(error).__name__
        code = _failed(f"{kind}: {error}; this is a defect: HEADWATER_DEBUG=1 shows where", 1)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _without_a_verb(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"headwater {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


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
    as_json: JsonOption = False,
) -> None:
    """Run a recipe's arms, evaluate, report. The same command again continues."""
    if api.follow(nproc, ray):
        return
    switches = ["compute.deterministic=true"] if deterministic else []
    switches += [f"compute.ranks={nproc}"] if nproc is not None else []
    result = api.run(
        recipe,
        out,
        profile=profile,
        overrides=[*set_, *switches],
        seeds=_numbers(seeds),
        arms=_names(arms),
        quiet=as_json,
        strict=strict,
        ray=ray,
    )
    _print(result, console.show_report, as_json)
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
        seeds=_numbers(seeds),
        arms=_names(arms),
        mean_response=mean_response,
        gpu_memory_gib=gpu_memory,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        calibration=calibration,
    )
    _print(result, console.show_plan, as_json)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders or sources as hf:ID; NAME=MODEL."),
    ],
    problems: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="gsm8k, math500, aime24, aime25, amc23, a file, hf:NAME or task:arithmetic; "
            "repeatable, NAME=SOURCE names it.",
        ),
    ],
    attempts: Annotated[int, typer.Option(help="Attempts at each problem (k).")] = 16,
    verifier: VerifierOption = "math",
    prompt: Annotated[str, typer.Option(help="boxed, hash, answer_is or bare.")] = "boxed",
    limit: Annotated[int | None, typer.Option(help="Only the first N problems.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest, of this mass.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the K likeliest tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    rows: Annotated[
        int | None, typer.Option(help="Responses decoded at once; fewer need less memory.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of every attempt; default runs/eval/MODEL-SET-HASH."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure avg@k, pass@k, maj@k; compare models. The same command again continues."""
    settings = api.evaluation_settings(
        problems=problems,
        attempts=attempts,
        verifier=verifier,
        prompt=prompt,
        limit=limit,
        sampling={
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_new_tokens": max_new_tokens,
        },
        seed=seed,
        compute={"device": device, "precision": precision},
        rows=rows,
    )
    on_batch = None if as_json else console.show_batch
    result = api.evaluate(models, settings, out, on_batch=on_batch)
    _print(result, console.show_comparison, as_json)


@app.command()
def verify(
    cases: Annotated[
        Path | None, typer.Argument(help="JSON Lines of {prediction, gold[, id, expected]}.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of a file: one output ...")
    ] = None,
    gold: Annotated[str | None, typer.Option(metavar="ANSWER", help="... and its answer.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was read and how it was compared.")
    ] = False,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the rows here; - is stdout.")
    ] = None,
    verifier: VerifierOption = "math",
    wrap_bare: Annotated[bool, typer.Option(help="Box predictions that have no box.")] = False,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds allowed for one case.")] = 5.0,
) -> None:
    """Grade a file of predictions, or one: a verdict each, and why."""
    given: Path | list[tuple[str, str]] | None = cases
    if cases is None and prediction is not None and gold is not None:
        given = [(prediction, gold)]
    if given is None or (cases is not None and (prediction is not None or gold is not None)):
        raise InputError("give a file of cases, or --prediction and --gold (not both)")
    result = api.verify(
        given,
        verifier,
        wrap_bare=wrap_bare,
        workers=workers,
        timeout_seconds=timeout,
        explain=explain,
    )
    if json_out is None:
        show = console.show_explained if explain else console.show_verified
        show(_stdout(), result)
    elif str(json_out) == "-":
        typer.echo(result.json_lines(), nl=False)
    else:
        result.write(json_out)
        typer.echo(f"{console.verified_in_words(result)}; rows in {json_out}")


@app.command()
def contamination(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training problems, or a recipe.")],
    evals: Annotated[
        list[str],
        typer.Option("--eval", metavar="[NAME=]SOURCE", help="An evaluation set; repeatable."),
    ] = [],  # noqa: B006
    ngram_words: Annotated[int, typer.Option("--ngram", help="Words of an n-gram.")] = 8,
    near_share: Annotated[
        float, typer.Option("--share", help="Shared n-grams from which problems are near.")
    ] = 0.5,
    csv: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write every pair here, with its texts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Name the training problems that are in an evaluation set, pair by pair."""
    result = api.contamination(
        train, api.named_sources(evals), ngram_words=ngram_words, near_share=near_share
    )
    if csv is not None:
        result.write_csv(csv)
    _print(result, console.show_contamination, as_json)


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Rebuild report.html, results.json and the tables of a run."""
    _print(api.report(run), console.show_report, as_json)


@app.command()
def samples(
    run: RunArgument,
    arm: Annotated[str | None, typer.Option(help="Only this arm.")] = None,
    stage: Annotated[str | None, typer.Option(help="A kind, or a stage's fingerprint.")] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="How many under a heading.")
    ] = 4,
    as_json: JsonOption = False,
) -> None:
    """Read what the models of a run wrote."""
    if as_json:
        found = api.samples(run, arm=arm, stage=stage, count=count)
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        console.show_samples(_stdout(), run, arm=arm, stage=stage, count=count)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices, extras and disk, test itself, and say what to do."""
    result = api.doctor()
    _print(result, console.show_diagnosis, as_json)
    if not result.healthy:
        raise typer.Exit(1)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Copy this shipped recipe.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where to; default ./NAME.yaml.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or copy one to edit."""
    if schema:
        typer.echo(json.dumps(api.schema(), indent=2))
    else:
        _print(api.recipes(name, to), console.show_recipes, as_json)


class _Result(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


_R = TypeVar("_R", bound=_Result)


def _print(result: _R, show: Callable[[Console, _R], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        show(_stdout(), result)


def _stdout() -> Console:
    """Plain when it is not a terminal: no colours, and lines as long as they are."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=200, color_system=None)


def _numbers(text: str | None) -> list[int] | None:
    """`0,1,2` as numbers; None for none given."""
    names = _names(text)
    if names is None:
        return None
    if not names or not all(name.removeprefix("-").isdecimal() for name in names):
        raise InputError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2")
    return [int(name) for name in names]


def _names(text: str | None) -> list[str] | None:
    """`x,y` as a list; None for none given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _failed(message: str, code: int) -> int:
    if os.environ.get("HEADWATER_DEBUG"):
        typer.echo(visible(redact(traceback.format_exc())), err=True)
    for line in redact(message).split("\n"):
        typer.echo(f"headwater: {one_line(line)}", err=True)
    return code
