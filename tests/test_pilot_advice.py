"""The rule of a pilot's advice, and the numbers it rests on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from headwater.evals.base_rates import BaseRates, Share, base_rates, signal_share
from headwater.types import AttemptTable
from headwater.workflow.advice import Measured, advise
from headwater.workflow.projection import Trial, end, gain, lead, stretch


def rates(pass_rate: float, at_group: float, signal: float, width: float = 0.02) -> BaseRates:
    def share(mean: float) -> Share:
        return Share(mean, mean - width, mean + width)

    return BaseRates(
        pass_rate=share(pass_rate),
        pass_at_k=share(at_group),
        signal=share(signal),
        truncation=0.0,
        unparseable=0.0,
        timeout=0.0,
        mean_tokens=20.0,
        longest_tokens=30,
    )


MODEL = rates(0.4, 0.9, 0.8)
SILENT = rates(0.01, 0.05, 0.05)
MEASURED = Measured(MODEL, MODEL, Share(0.0, -0.02, 0.02), labels=64, has_halves=True)


def test_signal_is_the_share_of_all_groups_that_can_be_drawn() -> None:
    right_QA = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=bool)
    mixed = [
        np.mean([0 < sum(group) < 3 for group in itertools.combinations(row, 3)])
        for row in right_QA.astype(int)
    ]
    assert signal_share(right_QA, 3).mean == pytest.approx(np.mean(mixed))


def test_base_rates_of_attempts() -> None:
    verdicts = np.array([[["correct", "incorrect"], ["unparseable", "timeout"]]])
    table = AttemptTable(
        problem_ids=("a", "b"),
        seeds=(0,),
        verdicts=verdicts,
        response_tokens=np.array([[[2, 4], [6, 8]]], dtype=np.int32),
        truncated=np.array([[[False, False], [False, True]]]),
    )
    found = base_rates(table, group_size=2)
    assert (found.pass_rate.mean, found.pass_at_k.mean, found.signal.mean) == (0.25, 0.5, 0.5)
    assert (found.truncation, found.unparseable, found.timeout) == (0.25, 0.25, 0.25)
    assert (found.mean_tokens, found.longest_tokens, found.headroom) == (5.0, 8, 0.25)


def test_a_trial_is_projected_along_log_odds() -> None:
    """From 1/3 to 1/2 in a third of the steps: log-odds 0 - ln 2 + 3 ln 2, so 4 to 1 at the end."""
    many = 30_000
    before_Q, after_Q = np.arange(many) % 3 == 0, np.arange(many) % 2 == 0
    trial = Trial(before_Q.astype(float), after_Q.astype(float), stretch=3.0)
    assert gain(trial).mean == pytest.approx(1 / 6)
    assert end(trial).mean == pytest.approx(0.8, abs=1e-3)
    assert end(trial).low < 0.8 < end(trial).high


def test_projections_stay_finite_where_all_or_nothing_is_solved() -> None:
    nothing, everything = np.zeros(16), np.ones(16)
    sure = Trial(everything, everything, 3.0)
    assert end(Trial(nothing, nothing, 3.0)).mean == pytest.approx(0.5 / 17)
    assert lead(sure, Trial(nothing, nothing, 3.0)).low > 0.9


def test_a_lead_pairs_problems() -> None:
    """Two models that differ by chance in the problems alone have a lead of nothing for certain."""
    scores_Q = np.linspace(0.0, 0.9, 12)
    trial = Trial(scores_Q, scores_Q + 0.05, 2.0)
    found = lead(trial, trial)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_stretch_counts_learning_rate() -> None:
    assert stretch(8, 24, 0) == pytest.approx(3.0**0.55)
    assert stretch(2, 4, 4) == pytest.approx(((1 + 2 + 3 + 4) / (1 + 2)) ** 0.55)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "too_close"),
        ({"lead": Share(0.2, 0.1, 0.3)}, "bridge"),
        ({"lead": Share(0.2, 0.1, 0.3), "labels": 128}, "half_split"),
        ({"lead": Share(0.2, 0.1, 0.3), "labels": 128, "has_halves": False}, "bridge"),
        ({"lead": Share(0.2, -0.1, 0.5)}, "too_close"),
        ({"lead": Share(0.04, 0.03, 0.05)}, "too_close"),
        ({"lead": Share(-0.09, -0.095, -0.085)}, "too_close"),
        ({"lead": Share(-0.2, -0.3, -0.1)}, "cold_grpo"),
        ({"lead": Share(-0.2, -0.4, -0.04)}, "too_close"),
        ({"teacher": SILENT, "student": SILENT}, "fix_base"),
        ({"teacher": SILENT, "lead": Share(0.2, 0.1, 0.3)}, "cold_grpo"),
        ({"student": SILENT, "lead": Share(-0.2, -0.3, -0.1)}, "bridge"),
        ({"student": replace(MODEL, truncation=0.4)}, "fix_base"),
        ({"teacher": replace(MODEL, unparseable=0.6)}, "fix_base"),
        ({"lead": None}, "too_close"),
        ({"lead": None, "student": rates(0.95, 1.0, 0.3)}, "cold_grpo"),
        ({"lead": None, "teacher": rates(0.95, 1.0, 0.3)}, "bridge"),
        ({"student": rates(0.99, 1.0, 0.04), "lead": Share(-0.2, -0.3, -0.1)}, "cold_grpo"),
    ],
)
def test_the_rule(changes: dict[str, object], verdict: str) -> None:
    assert advise(replace(MEASURED, **changes)).verdict == verdict


def test_advice_gives_its_evidence() -> None:
    behind = advise(replace(MEASURED, lead=Share(-0.2, -0.3, -0.1)))
    assert "-20.0 points" in behind.reasons[0] and "-30.0 to -10.0" in behind.reasons[0]
    untried = advise(replace(MEASURED, lead=None))
    assert "--trial 0" in untried.cautions[0]
