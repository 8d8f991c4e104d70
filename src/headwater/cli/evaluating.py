"""The verbs that measure: eval, verify, contamination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater import api, console
from headwater.cli import completion
from headwater.cli.app import MEASURE, print_result, verb
from headwater.cli.options import JsonOption, QuietOption, VerifierOption
from headwater.errors import InputError
from headwater.terminal import stdout_console


@verb(
    MEASURE,
    "tiny:student --problems task:arithmetic --prompt bare -n 9",
    "old=hf:ID-OR-PATH new=hf:ID-OR-PATH --problems gsm8k",
    name="eval",
)
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
            autocompletion=completion.benchmarks,
        ),
    ],
    attempts: Annotated[int, typer.Option(help="Attempts at each problem (k).")] = 16,
    verifier: VerifierOption = "math",
    prompt: Annotated[str, typer.Option(help="boxed, hash, answer_is or bare.")] = "boxed",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="Only the first N problems.")
    ] = None,
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
    quiet: QuietOption = False,
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
    on_batch = None if quiet or as_json else console.show_batch
    result = api.evaluate(models, settings, out, on_batch=on_batch)
    print_result(result, console.show_comparison, as_json)


@verb(
    MEASURE,
    "cases.jsonl",
    r"--prediction 'so it is \boxed{1/2}' --gold 0.5 --explain",
)
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
        show(stdout_console(), result)
    elif str(json_out) == "-":
        typer.echo(result.json_lines(), nl=False)
    else:
        result.write(json_out)
        typer.echo(f"{console.verified_in_words(result)}; rows in {json_out}")


@verb(MEASURE, "quickstart", "train.jsonl --eval gsm8k --csv pairs.csv")
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
    print_result(result, console.show_contamination, as_json)
