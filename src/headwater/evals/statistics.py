"""What an evaluation can say: estimates, intervals, paired differences, detectable effects.

Everything is pure and seeded. The unit of chance is the problem: attempts at one problem
stay together, because they are far from independent. With several seeds the training run is
a second unit; problems and seeds are crossed (every seed meets the same problems). The width
of an interval is that of Student's t on the variance components (`evals.variance`), its shape
that of a bootstrap which draws seeds, then one set of problems for all (`evals.resampling`).

Suffixes: S seeds, Q problems, A attempts, R resamples. Scores lie in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from headwater.errors import InputError
from headwater.evals.resampling import (
    RESAMPLES,
    calibrated_interval,
    calibrated_share_interval,
    resampled_means,
    sign_flip_p_value,
)
from headwater.evals.variance import (
    CONFIDENCE,
    Spread,
    at_least_p_value,
    crossed_spread,
    minimum_detectable_effect,
    t_p_value,
    t_quantile,
)

Answer = str | int | None  # as given, or which attempt first gave it
Answers = Sequence[Sequence[Answer]]  # [Q][A]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems (and seeds) with its uncertainty.

    standard_error: over problems, of the score averaged over attempts and seeds; nan when
    there is one problem. With one seed it is the paper's +/-.
    low, high: the 95 % interval; it covers problems and, with several seeds, seeds.
    seed_means: the mean of each seed's checkpoint, in seed order.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    seed_means: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second on the same problems.

    spread: `crossed_spread`. low, high: the 95 % interval. p_problems: two-sided sign-flip
    permutation over problems: do these very checkpoints differ? p_value: the larger of
    p_problems and the two-sided t test over seeds and problems: do the training procedures
    differ? With one seed it can only be p_problems, and says nothing of training luck.
    """

    mean: float
    spread: Spread
    low: float
    high: float
    p_problems: float
    p_value: float

    @property
    def standard_error(self) -> float:
        """Of the mean: over problems with one seed, over seeds and problems with several."""
        return self.spread.standard_error

    @property
    def degrees_of_freedom(self) -> float:
        """Of the t test; inf where all problems differ alike."""
        return self.spread.degrees_of_freedom

    def minimum_detectable(self, comparisons: int = 1) -> float:
        """Smallest true difference that 80 % of such studies would find at 5 %.

        comparisons: how many p-values the study corrects; the difference has to pass Holm's
        first step (Bonferroni), 5 % / comparisons. Raises InputError below one.
        """
        if comparisons < 1:
            raise InputError(f"comparisons={comparisons}; count this one too: give 1 or more")
        return minimum_detectable_effect(self.spread, significance=(1.0 - CONFIDENCE) / comparisons)

    def p_not_below(self, margin: float) -> float:
        """p-value of "first is worse than second by `margin` or more"; see `at_least_p_value`.

        Small: first is at least as good as second within the margin.
        """
        return at_least_p_value(self.mean, self.spread, margin)


def avg_at_k(correct: np.ndarray, *, seed: int = 0) -> Estimate:
    """avg@k: mean over problems of the mean correctness over k attempts.

    correct: bool or float [S, Q, A], or [Q, A] for one seed.
    Raises InputError when there is nothing to average.

    >>> avg_at_k(np.array([[True, False], [True, True]])).mean
    0.75
    """
    return estimate(_attempts(correct).mean(axis=2), seed=seed)


def pass_at_k(correct: np.ndarray, k: int, *, seed: int = 0) -> Estimate:
    """pass@k without bias: mean over problems of 1 - C(A - c, k) / C(A, k) (arXiv:2107.03374).

    correct: bool [S, Q, A] or [Q, A], of which c attempts at a problem are right.
    Raises InputError when k is not in 1..A.

    >>> pass_at_k(np.array([[True, False, False, False]] * 2), 2).mean
    0.5
    """
    correct_SQA = _attempts(correct)
    attempts = correct_SQA.shape[2]
    if not 1 <= k <= attempts:
        raise InputError(
            f"pass@{k} of {attempts} attempts; k must lie in 1..{attempts}: "
            f"sample at least {max(k, 1)} attempts per problem"
        )
    right_SQ = correct_SQA.sum(axis=2)
    missed_SQ = np.ones(right_SQ.shape)
    for drawn in range(k):  # one draw after another, without putting back
        missed_SQ *= np.maximum(attempts - right_SQ - drawn, 0) / (attempts - drawn)
    return estimate(1.0 - missed_SQ, seed=seed)


def maj_at_k(
    answers: Answers | Sequence[Answers], correct: np.ndarray, *, seed: int = 0
) -> Estimate:
    """maj@k: is the most frequent answer of the k attempts right, averaged over problems.

    answers: [S][Q][A], None where no answer could be read (it casts no vote; no vote at all is
    wrong). correct: bool [S, Q, A]. For one seed [Q][A] and [Q, A]. A tie is drawn by lot,
    that is, its expectation is taken. Raises InputError when the shapes differ.

    >>> maj_at_k([["4", "4", "5"], ["1", None, "2"]],
    ...          np.array([[True, True, False], [True, False, False]])).mean
    0.75
    """
    correct_SQA = _attempts(correct)
    one_seed = np.ndim(correct) == 2
    answers_SQA = [cast(Answers, answers)] if one_seed else cast(Sequence[Answers], answers)
    given = [[len(row) for row in answers_QA] for answers_QA in answers_SQA]
    seeds, problems, attempts = correct_SQA.shape
    if given != [[attempts] * problems] * seeds:
        raise InputError(
            f"answers of {len(answers)} {'problems' if one_seed else 'seeds'} against verdicts "
            f"{np.shape(correct)}; give one answer (or None) for each verdict"
        )
    score = [
        [majority_score(row, right) for row, right in zip(answers_QA, correct_QA, strict=True)]
        for answers_QA, correct_QA in zip(answers_SQA, correct_SQA, strict=True)
    ]
    return estimate(np.array(score), seed=seed)


def majority_score(answers_A: Sequence[Answer], correct_A: np.ndarray) -> float:
    """Probability that the most frequent answer to one problem is right; see `maj_at_k`."""
    votes = Counter(answer for answer in answers_A if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    share_right = [
        np.mean([right for given, right in zip(answers_A, correct_A, strict=True) if given == one])
        for one in leaders
    ]
    return float(np.mean(share_right))


def estimate(score: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of per-problem scores [S, Q] in [0, 1], with standard error and 95 % interval.

    The interval is `calibrated_share_interval`. Where every score is the same, nothing is seen to
    vary and certainty would be claimed, so `_same_score_interval` is used instead.
    """
    score_SQ = _scores(score)
    mean = float(score_SQ.mean())
    if _nothing_varies(score_SQ):
        low, high = _same_score_interval(mean, score_SQ.shape[1], bottom=0.0)
    else:
        means_R = resampled_means(score_SQ, resamples=resamples, seed=seed)
        low, high = calibrated_share_interval(means_R, mean, crossed_spread(score_SQ))
    return Estimate(
        mean=mean,
        standard_error=_error_over_problems(score_SQ.mean(axis=0)),
        low=max(low, 0.0),
        high=min(high, 1.0),
        seed_means=tuple(float(value) for value in score_SQ.mean(axis=1)),
    )


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    pair_seeds: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """first - second in avg@k on the same problems, with interval and p-value.

    first, second: bool [S, Q, A] or [Q, A]; attempts may differ, problems may not. Seeds are
    paired in order when their numbers agree and `pair_seeds` is set (arms of one run share
    their root seeds); otherwise each side's seeds are drawn for themselves. resamples: of the
    bootstrap and of the permutation. Raises InputError when the numbers of problems differ.
    """
    first_SQ, second_SQ = _attempts(first).mean(axis=2), _attempts(second).mean(axis=2)
    problems = first_SQ.shape[1]
    if problems != second_SQ.shape[1]:
        raise InputError(
            f"{problems} problems against {second_SQ.shape[1]}; a paired difference needs the "
            "same problems in the same order"
        )
    gap_Q = first_SQ.mean(axis=0) - second_SQ.mean(axis=0)
    mean = float(gap_Q.mean())
    if pair_seeds and len(first_SQ) == len(second_SQ):
        parts = [first_SQ - second_SQ]
    else:
        parts = [first_SQ, -second_SQ]
    if _nothing_varies(*parts):
        low, high = _same_score_interval(mean, problems, bottom=-1.0)
        half_width = t_quantile(0.5 + CONFIDENCE / 2, math.inf)
        spread = Spread((high - low) / 2.0 / half_width, math.inf)
    else:
        spread = crossed_spread(*parts)
        means_R = resampled_means(*parts, resamples=resamples, seed=seed)
        low, high = calibrated_interval(means_R, mean, spread)
    p_problems = sign_flip_p_value(gap_Q, permutations=resamples, seed=seed)
    one_seed = len(first_SQ) == len(second_SQ) == 1
    return Difference(
        mean=mean,
        spread=spread,
        low=max(low, -1.0),
        high=min(high, 1.0),
        p_problems=p_problems,
        p_value=p_problems if one_seed else max(p_problems, t_p_value(mean, spread)),
    )


def _nothing_varies(*parts_SQ: np.ndarray) -> bool:
    """Whether there is one problem, or every part is the same number throughout."""
    return parts_SQ[0].shape[1] == 1 or all(np.ptp(part_SQ) < 1e-12 for part_SQ in parts_SQ)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for the whole family of comparisons.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def _same_score_interval(mean: float, problems: int, *, bottom: float) -> tuple[float, float]:
    """Interval when all Q problems scored alike: a share u of others may still have been missed.

    u = 1 - 0.025^(1/Q) is Clopper and Pearson's bound for none in Q; such problems score
    anything between `bottom` and 1.
    """
    unseen = 1.0 - ((1.0 - CONFIDENCE) / 2.0) ** (1.0 / problems)
    return mean + unseen * (bottom - mean), mean + unseen * (1.0 - mean)


def _error_over_problems(score_Q: np.ndarray) -> float:
    if len(score_Q) < 2:
        return math.nan
    return float(score_Q.std(ddof=1) / math.sqrt(len(score_Q)))


def _attempts(correct: np.ndarray) -> np.ndarray:
    """float [S, Q, A] of bool or float [S, Q, A] or [Q, A]."""
    array = np.asarray(correct, dtype=np.float64)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.size == 0:
        raise InputError(
            f"verdicts of shape {np.shape(correct)}; expected [seeds, problems, attempts] or "
            "[problems, attempts] with at least one of each"
        )
    return array


def _scores(score: np.ndarray) -> np.ndarray:
    score_SQ = np.asarray(score, dtype=np.float64)
    if score_SQ.ndim != 2 or score_SQ.size == 0:
        raise InputError(
            f"scores of shape {np.shape(score)}; expected [seeds, problems] with at least one "
            "of each"
        )
    return score_SQ
