"""The sentences say what intervals carry, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.report.results import DifferenceRow, MapCell, MapResult, Results
from headwater.report.words import best_arm, closing_words
from run_folder import built_results


@pytest.fixture(scope="module")
def results() -> Results:
    return built_results((0, 1, 2), ("arithmetic",))


def difference(better: str, than: str, value: float, **changes: Any) -> DifferenceRow:
    fields: dict[str, Any] = {
        "eval_set": "arithmetic",
        "difference": value,
        "interval": (value - 0.03, value + 0.03),
        "standard_error": 0.015,
        "degrees_of_freedom": 8.0,
        "p_value": 0.0001,
        "p_problems": 0.0001,
        "p_value_corrected": 0.0003,
        "minimum_detectable": 0.042,
    }
    apart = (fields | changes)["p_value_corrected"] <= 0.05
    verdict = "undecided" if not apart else "supported" if value > 0 else "refuted"
    fields |= {"verdict": verdict}
    return DifferenceRow(better=better, than=than, **(fields | changes))


def said(results: Results, kind: str) -> list[str]:
    return [
        sentence.text.replace("\N{NO-BREAK SPACE}", " ")
        for sentence in closing_words(results)
        if sentence.kind == kind
    ]


def with_differences(results: Results, *rows: DifferenceRow) -> Results:
    return results.model_copy(update={"differences": rows})


def test_headline_names_the_best_use_of_the_labels(results: Results) -> None:
    best = max(
        (row for row in results.rows if row.evaluates == "student"), key=lambda r: r.avg_at_k
    )
    base = next(row for row in results.rows if row.arm == "base_student")
    assert best_arm(results) == best.arm
    assert closing_words(results)[0].text == (
        f"{best.title} took the student from {base.avg_at_k * 100:.1f}% to "
        f"{best.avg_at_k * 100:.1f}% right on arithmetic (avg@8) with 240 labels, the highest of 4 "
        "trained arms."
    )


def test_a_tie_names_no_highest(results: Results) -> None:
    best = best_arm(results)
    level = next(row.avg_at_k for row in results.rows if row.arm == best)
    tied = results.model_copy(
        update={
            "rows": tuple(
                row.model_copy(update={"avg_at_k": level}) if row.chain else row
                for row in results.rows
            )
        }
    )
    assert "the highest of" not in closing_words(tied)[0].text
    assert [text.endswith(" has the same.") for text in said(tied, "next")] == [True]


def test_found_against_and_open(results: Results) -> None:
    mixed = with_differences(
        results,
        difference("bridge", "cold_grpo", 0.09),
        difference("raw_bridge", "cold_grpo", -0.12),
        difference("half_split", "bridge", 0.01, p_value_corrected=0.4),
    )
    assert said(mixed, "found") == [
        "RL'd-teacher bridge is ahead of Cold GRPO by 9.0 points "
        "(95% interval 6.0 to 12.0, p < 0.001)."
    ]
    assert said(mixed, "against") == [
        "Against the recipe's expectation, Raw-teacher bridge is behind Cold GRPO by 12.0 points "
        "(95% interval 9.0 to 15.0, p < 0.001)."
    ]
    assert said(mixed, "open") == [
        "“Bridge, then GRPO on held-back labels” and RL'd-teacher bridge cannot be told apart: "
        "+1.0 points (−2.0 to +4.0, p = 0.4); a difference would have to be about 4.2 points to "
        "show four times in five."
    ]


def test_a_difference_lost_to_the_correction_says_so(results: Results) -> None:
    lost = with_differences(
        results, difference("bridge", "cold_grpo", 0.04, p_value_corrected=0.09)
    )
    assert "cannot be told apart once all comparisons are counted" in said(lost, "open")[0]
    assert said(lost, "found") == []


def test_many_differences_are_counted_not_listed(results: Results) -> None:
    many = with_differences(results, *[difference("bridge", "cold_grpo", 0.1)] * 5)
    assert len(said(many, "found")) == 4
    assert said(many, "found")[-1] == (
        "2 more comparisons also came out as expected; see the differences."
    )


def test_no_arm_better_than_the_base_is_said_plainly(results: Results) -> None:
    rows = tuple(
        row.model_copy(update={"avg_at_k": 0.1}) if row.chain else row for row in results.rows
    )
    poor = results.model_copy(update={"rows": rows})
    assert closing_words(poor)[0].text.startswith("No arm did better than Base student with ")


def test_nothing_trained_and_nothing_evaluated(results: Results) -> None:
    base = results.model_copy(
        update={"rows": tuple(row for row in results.rows if not row.chain), "differences": ()}
    )
    assert closing_words(base)[0].text.startswith("No arm was trained; on arithmetic: Base student")
    empty = results.model_copy(update={"rows": (), "differences": ()})
    assert [sentence.text for sentence in closing_words(empty)] == ["Nothing was evaluated."]


def test_unequal_verifier_calls_and_single_seeds_are_owned_up_to(results: Results) -> None:
    rows = tuple(
        row.model_copy(update={"spent": {"labels": 240, "verifier_calls": 12_800}})
        if row.arm == "bridge"
        else row
        for row in results.rows
    )
    uneven = with_differences(
        results.model_copy(update={"rows": rows, "seeds": (0,)}),
        difference("bridge", "cold_grpo", 0.1),
    )
    assert said(uneven, "caveat") == [
        "Equal labels are not equal verifier calls: RL'd-teacher bridge used 12.8k, "
        "Cold GRPO 9,600.",
        "One seed: the intervals cover the choice of problems, not the luck of a training run.",
    ]


def test_a_map_is_the_headline_where_nothing_else_is_claimed(results: Results) -> None:
    cell = MapCell(
        student="student",
        labels=8,
        base_rate=0.3,
        rule=0.9,
        against=0.7,
        difference=0.2,
        interval=(0.1, 0.3),
        p_value_corrected=0.001,
        outcome="wins",
    )
    mapped = results.model_copy(
        update={
            "map": MapResult(
                rule="bridge", against="cold_grpo", eval_set="arithmetic", cells=(cell,)
            )
        }
    )
    assert closing_words(mapped)[0].text.endswith("in 1 of 1 cells.")
    assert said(mapped, "next") == []
