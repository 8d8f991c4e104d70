"""From verdict tables to verdicts: differences, hypotheses, what teachers gained, the map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headwater.config.claims import Contrast, Hypothesis, MapSpec
from headwater.report.comparing import ArmEvaluation, Tables, compare, gains_of, judge, map_of
from headwater.types import AttemptTable

SEEDS, PROBLEMS, ATTEMPTS = 5, 60, 6


def evaluated(
    arm: str, rate: float, *, luck: Sequence[float] = (0.0,) * SEEDS, **more: object
) -> ArmEvaluation:
    """An arm that is right with `rate` plus each seed's luck, on problems of its own difficulty."""
    rng = np.random.default_rng([*arm.encode()])
    chance_SQ = np.clip(
        rate + np.array(luck)[:, None] + rng.normal(0, 0.05, (SEEDS, PROBLEMS)), 0, 1
    )
    right = rng.random((SEEDS, PROBLEMS, ATTEMPTS)) < chance_SQ[..., None]
    table = AttemptTable(
        problem_ids=tuple(f"p{n}" for n in range(PROBLEMS)),
        seeds=tuple(range(SEEDS)),
        verdicts=np.where(right, "correct", "incorrect"),
        response_tokens=np.full(right.shape, 9, np.int32),
        truncated=np.zeros(right.shape, bool),
    )
    values = {"title": arm, "evaluates": "student", "eval_set": "one", "table": table} | more
    return ArmEvaluation(arm=arm, **values)  # type: ignore[arg-type]


WAVER = (0.15, -0.15, 0.12, -0.12, 0.0)
TABLES = Tables(
    [
        evaluated("high", 0.8),
        evaluated("higher", 0.83, luck=(0.01, -0.01, 0.0, 0.01, -0.01)),
        evaluated("low", 0.4),
        evaluated("lucky", 0.7, luck=WAVER),
        evaluated("twin", 0.8),
    ]
)


def claim(better: str, than: str, **more: object) -> Contrast:
    return Contrast.model_validate({"better": better, "than": than, **more})


def test_a_claim_is_supported_refuted_or_undecided() -> None:
    rows = compare([claim("high", "low"), claim("low", "high"), claim("lucky", "low")], TABLES)
    assert [row.verdict for row in rows] == ["supported", "refuted", "supported"]
    (row,) = compare([claim("high", "lucky")], TABLES)
    assert row.verdict == "undecided"
    assert row.p_problems < 0.001 < 0.05 < row.p_value  # these checkpoints differ; training may not


def test_p_values_are_corrected_over_distinct_comparisons_only() -> None:
    many = [claim("high", "low"), claim("lucky", "low"), claim("high", "lucky")]
    again = [claim("high", "low", match=account) for account in ("labels", "verifier_calls")]
    rows, repeated = compare(many, TABLES), compare([*many, *again], TABLES)
    assert [row.p_value_corrected for row in repeated] == [row.p_value_corrected for row in rows]
    assert repeated[0].match == ("labels", "verifier_calls")
    assert rows[0].p_value_corrected == pytest.approx(3 * min(row.p_value for row in rows))
    assert rows[0].minimum_detectable > compare(many[:1], TABLES)[0].minimum_detectable


def test_not_being_behind_is_a_claim_of_its_own() -> None:
    margin = claim("high", "twin", not_worse_by=0.1)
    tight = claim("high", "twin", not_worse_by=0.001)
    behind = claim("low", "high", not_worse_by=0.1)
    verdicts = [compare([one], TABLES)[0].verdict for one in (margin, tight, behind)]
    assert verdicts == ["supported", "undecided", "refuted"]


def test_a_hypothesis_holds_with_all_and_falls_with_any_of_its_claims() -> None:
    def hypothesis(*claims: Contrast) -> Hypothesis:
        return Hypothesis(statement="So it is.", claims=claims)

    up, open_, down = claim("high", "low"), claim("high", "twin"), claim("low", "lucky")
    hypotheses = {
        "A": hypothesis(up),
        "B": hypothesis(up, open_),
        "C": hypothesis(up, open_, down),
        "D": hypothesis(claim("high", "nobody")),
    }
    rows = judge(hypotheses, compare([up, open_, down], TABLES))
    assert [(row.name, row.verdict, row.claims) for row in rows] == [
        ("A", "supported", (0,)),
        ("B", "undecided", (0, 1)),
        ("C", "refuted", (0, 1, 2)),
    ]


def test_gains_are_those_of_trained_teachers_over_their_base() -> None:
    teacher = {"evaluates": "teacher", "model": "teacher"}
    taught = ("teacher: grpo(labels)",)
    tables = Tables(
        [
            evaluated("base", 0.3, **teacher),
            evaluated("rl", 0.8, chain=taught, **teacher),
            evaluated("student", 0.5, model="student"),
        ]
    )
    (gain,) = gains_of(tables)
    assert (gain.model, gain.taught_by, gain.arms) == ("teacher", ("grpo(labels)",), ("rl",))
    assert gain.difference == pytest.approx(gain.after - gain.before)
    assert gain.interval[0] < gain.difference < gain.interval[1]


def test_the_map_says_where_the_rule_wins_ties_and_loses() -> None:
    spec = MapSpec(rule="r", against="a", students=("weak", "strong"), labels=(8, 64))
    rates = {
        "base.weak": 0.1,
        "r.weak.8": 0.6,
        "a.weak.8": 0.2,
        "r.weak.64": 0.7,
        "a.weak.64": 0.7,
        "base.strong": 0.8,
        "r.strong.8": 0.8,
        "a.strong.8": 0.95,
    }
    tables = Tables([evaluated(arm, rate) for arm, rate in rates.items()])
    found = map_of(spec, tables)
    assert found is not None
    assert [(cell.student, cell.labels, cell.outcome) for cell in found.cells] == [
        ("weak", 8, "wins"),
        ("weak", 64, "ties"),
        ("strong", 8, "loses"),
    ]  # a cell that was not evaluated yet is left out
    assert found.cells[0].base_rate == pytest.approx(0.1, abs=0.03)
    assert map_of(spec, Tables([])) is None
