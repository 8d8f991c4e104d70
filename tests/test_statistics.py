"""Statistics against plain loops, closed forms and simulation."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.evals import resampling, variance
from headwater.evals import statistics as stats
from headwater.seeding import generator


def draws(*shape: int, rate: float = 0.5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < rate


def test_average_and_standard_error_equal_plain_loops() -> None:
    correct_QA = draws(30, 4, rate=0.6)
    found = stats.avg_at_k(correct_QA)
    means = [sum(float(x) for x in row) / 4 for row in correct_QA]
    grand = sum(means) / 30
    variance = sum((m - grand) ** 2 for m in means) / 29
    assert found.mean == pytest.approx(grand, abs=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(variance / 30), abs=1e-12)
    assert found.seed_means == (pytest.approx(grand),)


def test_one_attempt_has_the_binomial_standard_error() -> None:
    correct_QA = np.array([[True]] * 30 + [[False]] * 70)
    assert stats.avg_at_k(correct_QA).standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_attempts_at_one_problem_are_a_cluster() -> None:
    """Repeating every attempt adds no information: mean, error and interval stay."""
    once_QA = draws(50, 1)
    often_QA = np.repeat(once_QA, 16, axis=1)
    assert stats.avg_at_k(often_QA) == stats.avg_at_k(once_QA)


def test_bootstrap_equals_a_plain_loop_over_its_own_draws() -> None:
    score_SQ = np.random.default_rng(3).random((1, 7))
    found_R = resampling.resampled_means(score_SQ, resamples=50, seed=5)
    rng = generator("statistics", "bootstrap", 5)
    drawn_RQ = rng.integers(0, 7, size=(50, 7))
    expected = [sum(score_SQ[0, q] for q in row) / 7 for row in drawn_RQ]
    np.testing.assert_allclose(found_R, expected, atol=1e-12)


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_problems() -> None:
    found = stats.avg_at_k(draws(400, 8, rate=0.4, seed=1))
    assert found.low == pytest.approx(found.mean - 1.96 * found.standard_error, abs=0.002)
    assert found.high == pytest.approx(found.mean + 1.96 * found.standard_error, abs=0.002)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    score_SQ = np.random.default_rng(0).random((3, 11))
    whole_R = resampling.resampled_means(score_SQ, resamples=40)
    monkeypatch.setattr(resampling, "_CHUNK_ELEMENTS", 100)
    np.testing.assert_array_equal(resampling.resampled_means(score_SQ, resamples=40), whole_R)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_contribute_their_unbiased_variance(seeds: int) -> None:
    """With no spread between problems the bootstrap's variance is s^2 / S, in closed form."""
    seed_mean_S = np.linspace(0.4, 0.6, seeds)
    score_SQ = np.repeat(seed_mean_S[:, None], 40, axis=1)
    means_R = resampling.resampled_means(score_SQ, resamples=60_000)
    assert means_R.var() == pytest.approx(seed_mean_S.var(ddof=1) / seeds, rel=0.03)


def test_crossed_bootstrap_keeps_the_variance_of_shared_problems() -> None:
    """Seeds that agree on every problem tell nothing new about problems: the error stays."""
    score_Q = draws(100, 1, seed=2).mean(axis=1)
    one = stats.estimate(score_Q[None])
    three = stats.estimate(np.repeat(score_Q[None], 3, axis=0))
    assert three.standard_error == pytest.approx(one.standard_error, abs=1e-12)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def test_interval_over_seeds_is_wider_than_that_of_one_seed() -> None:
    rates = [0.3, 0.5, 0.7]
    correct_SQA = np.stack([draws(200, 8, rate=rate, seed=i) for i, rate in enumerate(rates)])
    several, one = stats.avg_at_k(correct_SQA), stats.avg_at_k(correct_SQA[1])
    assert several.high - several.low > 3 * (one.high - one.low)
    assert several.seed_means == tuple(pytest.approx(x.mean()) for x in correct_SQA)


def test_coverage_of_the_interval_over_problems() -> None:
    """About 95 of 100 intervals hold the truth when problems differ in difficulty."""
    rng = np.random.default_rng(11)
    held = 0
    for trial in range(200):
        rate_Q = rng.beta(2, 3, size=80)
        correct_QA = rng.random((80, 4)) < rate_Q[:, None]
        found = stats.estimate(correct_QA.mean(axis=1)[None], seed=trial)
        held += found.low <= 0.4 <= found.high
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (False, 0.0, 1 - 0.025 ** (1 / 40)),
        (True, 0.025 ** (1 / 40), 1.0),
    ],
)
def test_all_alike_has_the_clopper_pearson_interval(value: bool, low: float, high: float) -> None:
    found = stats.avg_at_k(np.full((40, 4), value))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.standard_error == 0.0


def test_one_problem_has_no_standard_error_and_says_little() -> None:
    found = stats.avg_at_k(np.array([[True, False, True, True]]))
    assert math.isnan(found.standard_error)
    assert found.low < 0.05 and found.high > 0.95


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_equals_enumeration_of_subsets(k: int) -> None:
    correct_QA = draws(12, 5, rate=0.3, seed=4)
    expected = np.mean(
        [
            np.mean([any(row[i] for i in chosen) for chosen in combinations(range(5), k)])
            for row in correct_QA
        ]
    )
    assert stats.pass_at_k(correct_QA, k).mean == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_average_and_k_beyond_attempts_is_refused() -> None:
    correct_QA = draws(20, 4)
    assert stats.pass_at_k(correct_QA, 1).mean == pytest.approx(stats.avg_at_k(correct_QA).mean)
    with pytest.raises(InputError, match=r"pass@5 of 4 attempts"):
        stats.pass_at_k(correct_QA, 5)


def test_majority_ties_silence_and_wrong_majorities() -> None:
    answers = [["7", "7", "8"], ["1", "2", None], [None, None, None], ["9", "9", "3"]]
    correct = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=bool)
    assert stats.maj_at_k(answers, correct).mean == pytest.approx((1 + 0.5 + 0 + 0) / 4)


def test_sign_flip_equals_enumeration() -> None:
    gap = [0.5, -0.25, 0.75, 0.0, 0.25, 0.5, -0.125]
    observed = abs(sum(gap))
    patterns = [
        abs(sum(s * g for s, g in zip(signs, gap, strict=True))) >= observed - 1e-12
        for signs in product((-1, 1), repeat=len(gap))
    ]
    expected = sum(patterns) / len(patterns)
    assert resampling.sign_flip_p_value(np.array(gap)) == pytest.approx(expected, abs=1e-12)


def test_sampled_sign_flip_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gap_Q = np.random.default_rng(8).normal(0.25, 1.0, size=13)
    exact = resampling.sign_flip_p_value(gap_Q)
    monkeypatch.setattr(resampling, "EXACT_PROBLEMS", 0)
    assert resampling.sign_flip_p_value(gap_Q, permutations=40_000) == pytest.approx(
        exact, abs=0.01
    )


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(5)
    p_values = [
        resampling.sign_flip_p_value(rng.normal(size=40), permutations=400, seed=i)
        for i in range(400)
    ]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.085
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.05)


def test_paired_difference_in_closed_form_for_one_seed() -> None:
    first, second = draws(200, 4, rate=0.7, seed=1), draws(200, 4, rate=0.5, seed=2)
    found = stats.paired_difference(first, second)
    gap_Q = first.mean(axis=1) - second.mean(axis=1)
    error = gap_Q.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(gap_Q.mean())
    assert found.standard_error == pytest.approx(error)
    assert found.low == pytest.approx(gap_Q.mean() - 1.96 * error, abs=0.004)
    assert found.high == pytest.approx(gap_Q.mean() + 1.96 * error, abs=0.004)
    assert found.p_value == pytest.approx(1 / 10_001)
    assert found.degrees_of_freedom == 199
    assert found.p_value == found.p_problems
    assert found.minimum_detectable() == pytest.approx(2.8164 * error, rel=1e-3)


def test_pairing_removes_the_difficulty_of_problems() -> None:
    """Same problems, second arm wrong on one more attempt each: the gap is nearly certain."""
    second = np.repeat(draws(60, 1, seed=3), 8, axis=1)
    first = second.copy()
    first[:50, 0] = True
    second[:50, 0] = False
    found = stats.paired_difference(first, second)
    assert found.mean == pytest.approx(50 / 60 / 8)
    assert found.high - found.low < 0.04 < stats.avg_at_k(first).high - stats.avg_at_k(first).low


def test_difference_is_antisymmetric() -> None:
    first, second = draws(3, 50, 4, rate=0.6, seed=1), draws(3, 50, 4, rate=0.5, seed=2)
    forth, back = stats.paired_difference(first, second), stats.paired_difference(second, first)
    assert forth.mean == pytest.approx(-back.mean)
    assert (forth.low, forth.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert forth.p_value == back.p_value


def test_seed_pairing_cancels_what_seeds_share() -> None:
    base_S = np.array([0.2, 0.5, 0.8])
    rng = np.random.default_rng(0)
    second = rng.random((3, 300, 8)) < base_S[:, None, None]
    first = rng.random((3, 300, 8)) < base_S[:, None, None] + 0.05
    paired = stats.paired_difference(first, second)
    unpaired = stats.paired_difference(first, second, pair_seeds=False)
    assert paired.mean == unpaired.mean
    assert paired.high - paired.low < 0.25 * (unpaired.high - unpaired.low)


def test_different_numbers_of_seeds_are_allowed_and_of_problems_not() -> None:
    found = stats.paired_difference(draws(3, 40, 4, rate=0.9), draws(1, 40, 4, rate=0.1))
    assert found.low > 0.5
    with pytest.raises(InputError, match="40 problems against 39"):
        stats.paired_difference(draws(40, 4), draws(39, 4))


def test_two_hopeless_arms_are_not_declared_equal() -> None:
    found = stats.paired_difference(np.zeros((30, 4)), np.zeros((30, 4)))
    bound = 1 - 0.025 ** (1 / 30)
    assert (found.mean, found.p_value) == (0.0, 1.0)
    assert (found.low, found.high) == (pytest.approx(-bound), pytest.approx(bound))


def test_minimum_detectable_effect_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    effect = variance.minimum_detectable_effect(variance.Spread(1.0, math.inf))
    found = np.mean(np.abs(rng.normal(effect, 1.0, 200_000)) > 1.95996)
    assert found == pytest.approx(0.8, abs=0.005)


def test_holm_against_the_definition() -> None:
    assert stats.holm([0.02, 0.01, 0.9]) == pytest.approx([0.04, 0.03, 0.9])
    assert stats.holm([]) == []


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 0, 3), (1, 1, 1, 1)])
def test_shapes_that_mean_nothing_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected"):
        stats.avg_at_k(np.zeros(shape))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_estimates_lie_inside_their_interval(s: int, q: int, a: int, seed: int) -> None:
    found = stats.avg_at_k(draws(s, q, a, seed=seed))
    assert 0.0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1.0


def components_in_loops(table_SQ: np.ndarray) -> tuple[float, float, float]:
    """MS_seed, MS_problem and MS_interaction, written out."""
    seeds, problems = table_SQ.shape
    grand = sum(float(x) for x in table_SQ.ravel()) / (seeds * problems)
    seed_S = [sum(row) / problems for row in table_SQ]
    problem_Q = [sum(column) / seeds for column in table_SQ.T]
    rest = sum(
        (table_SQ[s, q] - seed_S[s] - problem_Q[q] + grand) ** 2
        for s in range(seeds)
        for q in range(problems)
    )
    return (
        problems * sum((x - grand) ** 2 for x in seed_S) / (seeds - 1),
        seeds * sum((x - grand) ** 2 for x in problem_Q) / (problems - 1),
        rest / ((seeds - 1) * (problems - 1)),
    )


def test_crossed_spread_equals_the_mean_squares_in_loops() -> None:
    rng = np.random.default_rng(0)
    table_SQ = rng.normal(size=(3, 1)) + rng.normal(size=(1, 20)) + rng.normal(size=(3, 20))
    over_seeds, over_problems, interaction = components_in_loops(table_SQ)
    assert min(over_seeds, over_problems) > interaction  # nothing is floored
    found = variance.crossed_spread(table_SQ)
    total = over_seeds + over_problems - interaction
    assert found.standard_error == pytest.approx(math.sqrt(total / 60))
    share = over_seeds / total
    expected = 1 / (share / 2 + (1 - share) ** 2 / 19)
    assert found.degrees_of_freedom == pytest.approx(expected)


def test_components_below_zero_count_as_zero() -> None:
    """Seeds that agree in their means but on no problem: the error is the interaction's."""
    table_SQ = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    found = variance.crossed_spread(table_SQ)
    assert found.standard_error == pytest.approx(math.sqrt(components_in_loops(table_SQ)[2] / 8))


def test_spread_of_one_seed_and_of_two_sets_of_seeds() -> None:
    first_SQ = np.random.default_rng(1).random((1, 30))
    one = variance.crossed_spread(first_SQ)
    assert one.standard_error == pytest.approx(first_SQ.std(ddof=1) / math.sqrt(30))
    assert one.degrees_of_freedom == 29
    luck = np.array([0.0, 0.5, 1.0])[:, None] + np.zeros((3, 30))
    wide = luck + np.random.default_rng(2).normal(scale=1e-3, size=(3, 30))
    both = variance.crossed_spread(wide, -2 * wide)
    assert both.standard_error == pytest.approx(0.5 * math.sqrt(5 / 3), rel=0.01)
    assert both.degrees_of_freedom == pytest.approx((1 + 4) ** 2 / ((1 + 16) / 2), rel=0.01)


def test_p_value_of_several_seeds_covers_training_luck() -> None:
    """One lucky seed of three: real for these checkpoints, not for the procedure."""
    second = np.stack([draws(300, 8, rate=0.5, seed=i) for i in range(3)])
    first = np.stack([draws(300, 8, rate=rate, seed=9) for rate in (0.5, 0.5, 0.8)])
    found = stats.paired_difference(first, second)
    assert found.p_problems < 0.001 < 0.2 < found.p_value
    assert found.degrees_of_freedom == pytest.approx(2, abs=0.1)
    assert found.low < 0.0 < found.high


def test_minimum_detectable_grows_with_comparisons_and_few_seeds() -> None:
    found = stats.paired_difference(draws(2, 50, 4), draws(2, 50, 4, seed=1))
    assert found.minimum_detectable() < found.minimum_detectable(10)
    assert variance.minimum_detectable_effect(variance.Spread(1.0, 1e6)) == pytest.approx(
        variance.minimum_detectable_effect(variance.Spread(1.0, math.inf)), rel=1e-4
    )
    with pytest.raises(InputError, match="comparisons=0"):
        found.minimum_detectable(0)


@pytest.mark.parametrize("degrees_of_freedom", [2.0, 6.5])
def test_minimum_detectable_effect_of_a_t_test(degrees_of_freedom: float) -> None:
    rng = np.random.default_rng(4)
    effect = variance.minimum_detectable_effect(variance.Spread(1.0, degrees_of_freedom))
    error = np.sqrt(rng.chisquare(degrees_of_freedom, 200_000) / degrees_of_freedom)
    critical = variance.t_quantile(0.975, degrees_of_freedom)
    found = np.abs(rng.normal(effect, 1.0, 200_000)) > critical * error
    assert found.mean() == pytest.approx(0.8, abs=0.005)


def test_not_below_a_margin() -> None:
    """The p-value is about 0.025 where the margin is the lower end of the 95 % interval."""
    first, second = draws(3, 200, 8, seed=1), draws(3, 200, 8, seed=2)
    found = stats.paired_difference(first, second)
    reach = variance.t_quantile(0.975, found.degrees_of_freedom) * found.standard_error
    assert found.p_not_below(reach - found.mean) == pytest.approx(0.025, abs=0.002)
    assert found.p_not_below(0.0) > found.p_not_below(0.1) > found.p_not_below(0.5)
    with pytest.raises(InputError, match=r"margin=-0\.1"):
        found.p_not_below(-0.1)


def test_majority_of_several_seeds_is_that_of_each() -> None:
    answers = [[["7", "7", "8"], ["1", "2", None]], [["8", "8", "7"], ["2", "2", "1"]]]
    correct = np.array([[[1, 1, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=bool)
    found = stats.maj_at_k(answers, correct)
    assert found.seed_means == (0.75, 0.5)
    with pytest.raises(InputError, match="answers of 1 seeds"):
        stats.maj_at_k(answers[:1], correct)
