"""The verbs of a finished model: export, chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headwater import api, console
from headwater.cli.app import MODELS, print_result, verb
from headwater.cli.options import JsonOption
from headwater.errors import InputError
from headwater.terminal import stdout_console
from headwater.visible import one_line, visible

if TYPE_CHECKING:
    from headwater.chat import Chat

_YOU = "> "


@verb(
    MODELS,
    "runs/quickstart --arm bridge --to my-model",
    "runs/quickstart --arm bridge --format gguf --to my-gguf",
)
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's folder, a model folder, or hf:ID.")
    ],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to; new or empty.")],
    arm: Annotated[str | None, typer.Option(help="Which arm of the run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which seed; default the first.")] = None,
    role: Annotated[
        Literal["teacher", "student"] | None,
        typer.Option("--as", help="The arm's teacher or student; default the one evaluated."),
    ] = None,
    format: Annotated[
        Literal["hf", "gguf", "adapter"],
        typer.Option(help="For transformers and vLLM, for llama.cpp, or LoRA's adapter alone."),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, of gguf also q8_0; default as trained."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload to the hub as well.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the folder holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as a folder that transformers, vLLM or llama.cpp load, with its card."""
    result = api.export(
        model,
        to,
        arm=arm,
        seed=seed,
        role=role,
        format=format,
        dtype=dtype,
        push=push,
        force=force,
    )
    print_result(result, console.show_export, as_json)


@verb(
    MODELS,
    "runs/quickstart --arm bridge",
    "hf:Qwen/Qwen3-0.6B --once 'What is 12 + 30?'",
)
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run's folder, a model folder, hf:ID, gguf:PATH."),
    ],
    arm: Annotated[str | None, typer.Option(help="Which arm of the run.")] = None,
    once: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Print one answer and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A message before all others.")] = None,
    prompt: Annotated[str, typer.Option(help="boxed, hash, answer_is or bare.")] = "bare",
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest, of this mass.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the K likeliest tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk to a model: line by line, or one prompt a line from a pipe."""
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
    }
    talk = api.chat(
        model,
        arm=arm,
        system=system,
        prompt=prompt,
        sampling=sampling,
        seed=seed,
        device=device,
        precision=precision,
    )
    with talk:
        if once is not None:
            _answer(talk, once, as_json)
        elif sys.stdin.isatty():
            _converse(talk, as_json)
        else:
            for line in filter(None, map(str.strip, sys.stdin)):
                talk.reset()  # each line of a pipe stands for itself
                _answer(talk, line, as_json)


def _converse(talk: Chat, as_json: bool) -> None:
    """Answer lines until /exit or the end of input; a line that cannot be answered says why."""
    typer.echo(f"{visible(talk.name)}: /reset begins anew, /exit ends", err=True)
    while True:
        try:
            line = input(_YOU).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            typer.echo(f"{line}: expected /reset, /exit or what to say", err=True)
        elif line:
            try:
                _answer(talk, line, as_json)
            except InputError as error:
                typer.echo(f"headwater: {one_line(str(error))}", err=True)


def _answer(talk: Chat, line: str, as_json: bool) -> None:
    """Print the answer: as it is written where a person looks on, otherwise when it is whole."""
    if as_json:
        typer.echo(json.dumps(talk.say(line).as_dict()))
        return
    out = stdout_console()
    growing = console.GrowingText(out) if out.is_terminal else None
    answer = talk.say(line, None if growing is None else growing.show)
    console.show_answer(out, answer, growing)
