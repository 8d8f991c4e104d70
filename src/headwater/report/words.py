"""What happened, in sentences: which use of the labels bought most, and what stays open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.report.map_view import map_words
from headwater.report.quantities import count, p_value, percent, points
from headwater.report.results import DifferenceRow, HypothesisRow, Judgement, Results, Row

_NAMED_AT_MOST = 3  # differences of one kind spelled out; the rest are counted
_UNEVEN = 1.25  # ratio of verifier calls from which two arms are not matched on them


@dataclass(frozen=True, slots=True)
class Sentence:
    """One statement; `against` is something found that the recipe did not expect."""

    kind: Literal["headline", "next", "found", "against", "open", "caveat"]
    text: str


def closing_words(results: Results) -> list[Sentence]:
    """The run in a few sentences, headline first; only what intervals and p-values carry.

    Hypotheses come before arms, where there are any, and speak for their differences. Another
    difference counts as found when its interval leaves out zero and Holm's p-value is at most
    0.05; otherwise the sentence says how large it would have had to be.
    """
    if not results.rows:
        return [Sentence("headline", "Nothing was evaluated.")]
    judged = primary_hypotheses(results)
    if judged:
        said = [Sentence("headline", _judged(judged)), *_refuted(judged)]
        said.append(Sentence("next", _headline(results)))
    elif results.map is not None and results.map.cells:  # its students have bases of their own
        said = [Sentence("headline", map_words(results))]
    else:
        said = [Sentence("headline", _headline(results)), *_next_best(results)]
    claimed = {index for one in results.hypotheses for index in one.claims}
    others = [
        row
        for index, row in enumerate(results.differences)
        if index not in claimed and not (judged and row.eval_set != judged[0].eval_set)
    ]
    found = [row for row in others if row.told_apart and row.difference > 0]
    against = [row for row in others if row.told_apart and row.difference < 0]
    still_open = [row for row in others if not row.told_apart]
    said += _spelled_out("found", [_found(results, row) for row in found])
    said += _spelled_out("against", [_against(results, row) for row in against])
    said += _spelled_out("open", [_open(results, row) for row in still_open])
    said += [Sentence("caveat", text) for text in _caveats(results)]
    return said


def best_arm(results: Results) -> str | None:
    """The trained arm with the highest score on the first evaluation set, if any."""
    trained = _trained(results) if results.rows else []
    return trained[0].arm if trained else None


def primary_hypotheses(results: Results) -> list[HypothesisRow]:
    """The hypotheses as judged on the first evaluation set that judges any."""
    first = next((name for name in results.eval_sets() if _on(results, name)), None)
    return [] if first is None else _on(results, first)


def _on(results: Results, eval_set: str) -> list[HypothesisRow]:
    return [row for row in results.hypotheses if row.eval_set == eval_set]


def _judged(rows: Sequence[HypothesisRow]) -> str:
    """How many hypotheses came out how, with their names."""
    counted: list[tuple[int, str]] = []
    verbs: tuple[tuple[Judgement, str, str], ...] = (
        ("supported", "is supported", "are supported"),
        ("refuted", "is refuted", "are refuted"),
        ("undecided", "stays undecided", "stay undecided"),
    )
    for verdict, one, many in verbs:
        names = [row.name for row in rows if row.verdict == verdict]
        if names:
            text = f"{len(names)} {one if len(names) == 1 else many} ({_listed(names)})"
            counted.append((len(names), text))
    if len(counted) == 1 and len(rows) > 1:
        return f"All {len(rows)} hypotheses {counted[0][1].partition(' ')[2]}."
    noun = "hypothesis" if len(rows) == 1 else "hypotheses"
    return f"Of {len(rows)} {noun}, {_listed([text for _, text in counted])}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _refuted(rows: Sequence[HypothesisRow]) -> list[Sentence]:
    """What was refuted, word by word: it must not be overlooked."""
    return [
        Sentence("against", f"{row.name} is refuted: “{row.statement.rstrip('.')}”.")
        for row in rows
        if row.verdict == "refuted"
    ]


def _headline(results: Results) -> str:
    eval_set = results.eval_sets()[0]
    candidates, trained = _first_set(results), _trained(results)
    base = next((row for row in candidates if not row.chain), None)
    if not trained:
        listed = ", ".join(f"{row.title} {percent(row.avg_at_k)}" for row in candidates)
        return f"No arm was trained; on {eval_set}: {listed}."
    best = trained[0]
    name, reached = _in_a_sentence(best.title), percent(best.avg_at_k)
    measure = f"right on {eval_set} (avg@{best.attempts})"
    if base is not None and best.avg_at_k <= base.avg_at_k:
        return (
            f"No arm did better than {_in_a_sentence(base.title)} with {percent(base.avg_at_k)} "
            f"{measure}; the best trained one, {name}, has {reached}."
        )
    if base is None:
        opening = f"{name} answered {reached} {measure}"
    else:
        start = percent(base.avg_at_k)
        opening = f"{name} took the {best.evaluates} from {start} to {reached} {measure}"
    rank = ""
    if len(trained) > 1 and trained[1].avg_at_k < best.avg_at_k:
        rank = f", the highest of {len(trained)} trained arms"
    return f"{opening} {_with_labels(best)}{rank}."


def _with_labels(row: Row) -> str:
    labels = row.spent.get("labels", 0)
    if not labels:
        return "without a label"
    return f"with {count(labels)} label{'s' if labels != 1 else ''}"


def _next_best(results: Results) -> list[Sentence]:
    trained = _trained(results)
    if len(trained) < 2:
        return []
    best, second = trained[:2]
    if second.avg_at_k == best.avg_at_k:
        return [Sentence("next", f"{_in_a_sentence(second.title)} has the same.")]
    text = f"Next is {_in_a_sentence(second.title)} with {percent(second.avg_at_k)}"
    compared = any({row.better, row.than} == {best.arm, second.arm} for row in results.differences)
    if not compared and second.interval[1] >= best.interval[0]:
        text += "; the intervals of the two overlap"
    return [Sentence("next", f"{text}.")]


def _trained(results: Results) -> list[Row]:
    """Trained students (or teachers, if there are only those) on the first set, best first."""
    rows = [row for row in _first_set(results) if row.chain]
    return sorted(rows, key=lambda row: row.avg_at_k, reverse=True)


def _first_set(results: Results) -> list[Row]:
    rows = [row for row in results.rows if row.eval_set == results.eval_sets()[0]]
    return [row for row in rows if row.evaluates == "student"] or rows


def _spelled_out(kind: Literal["found", "against", "open"], texts: Sequence[str]) -> list[Sentence]:
    said = [Sentence(kind, text) for text in texts[:_NAMED_AT_MOST]]
    more = len(texts) - len(said)
    if more:
        ending = {
            "found": "also came out as expected",
            "against": "also came out against expectation",
            "open": "also could not be told apart",
        }[kind]
        noun = "comparison" if more == 1 else "comparisons"
        said.append(Sentence(kind, f"{more} more {noun} {ending}; see the differences."))
    return said


def _found(results: Results, row: DifferenceRow) -> str:
    names = _names(results)
    return (
        f"{names[row.better]} is ahead of {names[row.than]} by {_gap(row)}{_where(results, row)}."
    )


def _against(results: Results, row: DifferenceRow) -> str:
    names = _names(results)
    return (
        f"Against the recipe's expectation, {names[row.better]} is behind {names[row.than]} by "
        f"{_gap(row)}{_where(results, row)}."
    )


def _open(results: Results, row: DifferenceRow) -> str:
    names = _names(results)
    low, high = row.interval
    counted = "" if low <= 0.0 <= high else " once all comparisons are counted"
    return (
        f"{names[row.better]} and {names[row.than]} cannot be told apart"
        f"{_where(results, row)}{counted}: {points(row.difference)} points "
        f"({points(low)} to {points(high)}, {p_value(row.p_value_corrected)}); a difference would "
        f"have to be about {row.minimum_detectable * 100:.1f} points to show four times in five."
    )


def _gap(row: DifferenceRow) -> str:
    low, high = sorted(abs(bound) for bound in row.interval)
    return (
        f"{abs(row.difference) * 100:.1f} points (95% interval {low * 100:.1f} to "
        f"{high * 100:.1f}, {p_value(row.p_value_corrected)})"
    )


def _names(results: Results) -> dict[str, str]:
    """Arm -> title as a sentence can hold it: one with a comma is put in quotes."""
    return {arm: _in_a_sentence(title) for arm, title in results.titles().items()}


def _in_a_sentence(title: str) -> str:
    return f"“{title}”" if "," in title else title


def _where(results: Results, row: DifferenceRow) -> str:
    return f" on {row.eval_set}" if len(results.eval_sets()) > 1 else ""


def _caveats(results: Results) -> list[str]:
    said = []
    uneven = _uneven_calls(results)
    if uneven:
        said.append(uneven)
    seeds = len(results.seeds)
    if seeds == 1:
        said.append(
            "One seed: the intervals cover the choice of problems, not the luck of a training run."
        )
    elif seeds == 2:
        said.append("Two seeds show only roughly how much the luck of a training run matters.")
    return said


def _uneven_calls(results: Results) -> str | None:
    """The contrast whose arms differ most in verifier calls, if any differs much."""
    students_last = sorted(results.rows, key=lambda row: row.evaluates == "student")
    calls = {row.arm: row.spent.get("verifier_calls", 0) for row in students_last}
    labels = {row.arm: row.spent.get("labels", 0) for row in students_last}
    uneven = []
    for row in results.differences:
        if row.match:  # its accounts have a table of their own
            continue
        pair = (calls.get(row.better, 0), calls.get(row.than, 0))
        if (
            labels.get(row.better) == labels.get(row.than)
            and min(pair) > 0
            and max(pair) / min(pair) >= _UNEVEN
        ):
            uneven.append((max(pair) / min(pair), row, pair))
    if not uneven:
        return None
    _, row, pair = max(uneven, key=lambda entry: entry[0])
    names = _names(results)
    return (
        f"Equal labels are not equal verifier calls: {names[row.better]} used {count(pair[0])}, "
        f"{names[row.than]} {count(pair[1])}."
    )
