"""How an evaluation reads in a terminal: tables to cite, and the settings they hold for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headwater.comparison.compare import BatchDone
from headwater.comparison.record import Comparison, SetComparison
from headwater.evals.scores import PartScore
from headwater.evals.statistics import Estimate
from headwater.report.quantities import duration, p_value, percent, points
from headwater.terminal import HEADING
from headwater.visible import one_line, visible

_HASH_CHARACTERS = 12
#: Consoles of fewer columns do without pass@k between 1 and k, and without median and longest.
_WIDE = 100


def print_batch(console: Console, batch: BatchDone) -> None:
    """A line: how far one model is on one set."""
    left = f"; about {duration(batch.seconds_left)} left" if batch.done < batch.problems else ""
    console.print(
        Text(
            f"{one_line(batch.model)} on {batch.set_name}: "
            f"{batch.done} of {batch.problems} problems, "
            f"{percent(batch.pass_rate)} of the last batch right, "
            f"{batch.tokens_per_second:.0f} tokens/s{left}"
        )
    )


def print_comparison(console: Console, found: Comparison) -> None:
    """For each set its scores, how answers ended, levels, subjects and pairs; then the settings."""
    models = [model.name for model in found.models]
    for one in found.sets:
        wide = console.width >= _WIDE
        console.print(_scores(models, one, wide=wide))
        console.print(_endings(models, one, wide=wide))
        levels = [score.levels for score in one.scores]
        subjects = [score.subjects for score in one.scores]
        for what, parts in (("level", levels), ("subject", subjects)):
            if parts[0]:
                console.print(_parts(what, models, one, parts))
        if one.differences:
            console.print(_differences(one))
    for line in in_words(found):
        console.print(Text(one_line(line)))


def in_words(found: Comparison) -> Iterator[str]:
    """Everything the tables hold for, a line each: settings, models, problems, what ± is."""
    settings, sampling = found.settings, found.settings.sampling
    drawn = (
        "greedy decoding" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    )
    filters = f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    filters += "" if sampling.top_k is None else f", top-k {sampling.top_k}"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    yield (
        f"settings: {drawn}{filters}, at most {sampling.max_new_tokens:,} new tokens, prompt "
        f"{settings.prompt}, verifier {settings.verifier}, seed {settings.seed}; {versions}"
    )
    for model in found.models:
        named = "" if model.name == model.source else f" is {model.source}"
        threads = f"{model.threads} thread{'s' if model.threads > 1 else ''}"
        yield (
            f"model {model.name}{named}: sha256 {model.sha256[:_HASH_CHARACTERS]}, on "
            f"{model.device} in {model.precision}, {threads}, {model.rows} rows at once"
        )
    for one in found.sets:
        named = "" if one.name == one.source else f" is {one.source}"
        first = f"the first {one.problems:,} of" if one.problems < one.available else "all"
        yield (
            f"problems {one.name}{named}: {first} {one.available:,}, sha256 "
            f"{one.sha256[:_HASH_CHARACTERS]}"
        )
    yield (
        "± is the standard error over problems, intervals are of 95% over problems; pass@k is "
        "unbiased (arXiv:2107.03374); for maj@k equal answers vote together, and a tie counts as "
        "the share of its answers that are right"
    )
    yield f"every attempt: {found.out}"


def _scores(models: Sequence[str], one: SetComparison, *, wide: bool) -> Table:
    k = one.scores[0].attempts
    draws = [draw for draw in one.scores[0].pass_at if draw > 1 and (wide or draw == k)]
    several = (*(f"pass@{draw}" for draw in draws), f"maj@{k}") if draws else ()
    table = _table(f"{_title(one)}, in per cent", f"avg@{k} ± SE", "95% interval", *several)
    for model, score in zip(models, one.scores, strict=True):
        cells = [_with_error(score.avg_at_k), _interval(score.avg_at_k)]
        if draws:
            cells += [_with_error(score.pass_at[draw]) for draw in draws]
            cells.append(_with_error(score.maj_at_k))
        table.add_row(Text(visible(model)), *cells)
    return table


def _endings(models: Sequence[str], one: SetComparison, *, wide: bool) -> Table:
    k = one.scores[0].attempts
    solved = ("any right", "all right") if k > 1 else ()
    lengths = ("tokens", "median", "longest") if wide else ("tokens",)
    table = _table(
        f"{one.name}: problems solved, response tokens, how attempts ended",
        *solved,
        *lengths,
        "cut off",
        "no answer",
        "timeout",
    )
    for model, score in zip(models, one.scores, strict=True):
        cells = [percent(score.solved_once), percent(score.solved_always)] if solved else []
        cells.append(f"{score.mean_response_tokens:.1f}")
        if wide:
            cells += [f"{score.median_response_tokens:g}", str(score.max_response_tokens)]
        cells += [
            percent(score.truncated_share),
            percent(score.unparseable_share),
            percent(score.timeout_share),
        ]
        table.add_row(Text(visible(model)), *cells)
    return table


def _parts(
    what: str, models: Sequence[str], one: SetComparison, parts: Sequence[Sequence[PartScore]]
) -> Table:
    """A row a level or subject: of one model all rates, of several their avg@k."""
    k = one.scores[0].attempts
    alone = len(models) == 1
    rates = (f"avg@{k} ± SE", f"pass@{k}", f"maj@{k}")[: 3 if k > 1 else 1]
    headings = rates if alone else tuple(f"{model} avg@{k}" for model in models)
    table = _table(f"{one.name} by {what}, in per cent", "problems", *headings, first=what)
    for row in zip(*parts, strict=True):
        of_one = (row[0].avg_at_k, row[0].pass_at_k, row[0].maj_at_k)[: len(rates)]
        estimates = of_one if alone else tuple(part.avg_at_k for part in row)
        cells = [_with_error(estimate) for estimate in estimates]
        table.add_row(Text(visible(row[0].name)), str(row[0].problems), *cells)
    return table


def _differences(one: SetComparison) -> Table:
    k = one.scores[0].attempts
    table = _table(
        f"{one.name}: differences in avg@{k}, in points",
        "difference",
        "95% interval",
        "p (Holm)",
        first="pair",
    )
    for pair in one.differences:
        found = pair.difference
        names = Text(visible(f"{pair.first} − {pair.second}"))
        interval = f"{points(found.low)} to {points(found.high)}"
        table.add_row(names, points(found.mean), interval, p_value(pair.p_value_corrected))
    return table


def _title(one: SetComparison) -> str:
    of = f" of {one.available:,}" if one.problems < one.available else ""
    attempts = one.scores[0].attempts
    tries = f"{attempts} attempts" if attempts > 1 else "one attempt"
    return f"{one.name}: {one.problems:,}{of} problems × {tries}"


def _with_error(estimate: Estimate) -> str:
    mean = percent(estimate.mean)[:-1]
    if estimate.standard_error != estimate.standard_error:  # of one problem there is none
        return mean
    return f"{mean} ± {percent(estimate.standard_error)[:-1]}"


def _interval(estimate: Estimate) -> str:
    return f"{percent(estimate.low)[:-1]} to {percent(estimate.high)[:-1]}"


def _table(title: str, *columns: str, first: str = "model") -> Table:
    table = Table(
        title=Text(visible(title)),
        title_justify="left",
        title_style=HEADING,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(Text(visible(column)), justify="right", overflow="fold")
    return table
