"""What an evaluation can say: estimates, intervals, paired differences, detectable effects.

Everything is pure and seeded. The unit of chance is the problem: attempts at one problem
stay together, because they are far from independent. With several seeds the training run is
a second unit; problems and seeds are crossed (every seed meets the same problems), so a
resample draws seeds, then one set of problems for all of them.

Suffixes: S seeds, Q problems, A attempts, R resamples. Scores lie in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import norm

from headwater.errors import InputError
from headwater.seeding import generator

RESAMPLES = 10_000
CONFIDENCE = 0.95
EXACT_PROBLEMS = 14  # up to here all 2^Q sign patterns are enumerated
_CHUNK_ELEMENTS = 2_000_000  # bounds the memory of one block of resamples


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

    standard_error: over problems with one seed; with several, the spread of the bootstrap,
    which also covers seeds. p_value: two-sided, over problems, for these checkpoints.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float

    @property
    def minimum_detectable(self) -> float:
        """Smallest true difference that 80 % of such comparisons would show at 5 %."""
        return minimum_detectable_effect(self.standard_error)


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
    answers: Sequence[Sequence[str | None]], correct: np.ndarray, *, seed: int = 0
) -> Estimate:
    """maj@k: is the most frequent answer of the k attempts right, averaged over problems.

    answers: [Q][A], None where no answer could be read (it casts no vote; no vote at all is
    wrong). correct: bool [Q, A]. A tie is drawn by lot, that is, its expectation is taken.

    >>> maj_at_k([["4", "4", "5"], ["1", None, "2"]],
    ...          np.array([[True, True, False], [True, False, False]])).mean
    0.75
    """
    correct_QA = _attempts(correct)[0]
    if [len(row) for row in answers] != [correct_QA.shape[1]] * correct_QA.shape[0]:
        raise InputError(
            f"answers of {len(answers)} problems against verdicts {correct_QA.shape}; "
            "give one answer (or None) for each verdict"
        )
    score_Q = [_majority_score(row, right) for row, right in zip(answers, correct_QA, strict=True)]
    return estimate(np.array([score_Q]), seed=seed)


def _majority_score(answers_A: Sequence[str | None], correct_A: np.ndarray) -> float:
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


def estimate(score: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of per-problem scores [S, Q] in [0, 1], with standard error and 95 % interval.

    The interval is the percentile interval of `resampled_means`. Where every score is the
    same a bootstrap would claim certainty, so `_same_score_interval` is used instead.
    """
    score_SQ = _scores(score)
    mean = float(score_SQ.mean())
    if score_SQ.shape[1] == 1 or np.ptp(score_SQ) == 0.0:
        low, high = _same_score_interval(mean, score_SQ.shape[1], bottom=0.0)
    else:
        low, high = _percentile_interval(resampled_means(score_SQ, seed=seed))
    return Estimate(
        mean=mean,
        standard_error=_error_over_problems(score_SQ.mean(axis=0)),
        low=max(low, 0.0),
        high=min(high, 1.0),
        seed_means=tuple(float(value) for value in score_SQ.mean(axis=1)),
    )


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, pair_seeds: bool = True, seed: int = 0
) -> Difference:
    """first - second in avg@k on the same problems, with interval and p-value.

    first, second: bool [S, Q, A] or [Q, A]; attempts may differ, problems may not. Seeds are
    paired in order when their numbers agree and `pair_seeds` is set (arms of one run share
    their root seeds); otherwise each side's seeds are drawn for themselves.
    Raises InputError when the numbers of problems differ.
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
    one_seed = len(first_SQ) == len(second_SQ) == 1
    if pair_seeds and len(first_SQ) == len(second_SQ):
        parts = [first_SQ - second_SQ]
    else:
        parts = [first_SQ, -second_SQ]
    if problems == 1 or all(np.ptp(part_SQ) == 0.0 for part_SQ in parts):
        low, high = _same_score_interval(mean, problems, bottom=-1.0)
        spread = (high - low) / (2.0 * float(norm.ppf(0.5 + CONFIDENCE / 2)))
    else:
        means_R = resampled_means(*parts, seed=seed)
        low, high = _percentile_interval(means_R)
        spread = _error_over_problems(gap_Q) if one_seed else float(means_R.std(ddof=1))
    return Difference(
        mean=mean,
        standard_error=spread,
        low=max(low, -1.0),
        high=min(high, 1.0),
        p_value=sign_flip_p_value(gap_Q, seed=seed),
    )


def sign_flip_p_value(gap_Q: np.ndarray, *, permutations: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference: how often random signs do as well or better.

    gap_Q: float [Q], differences per problem; if the arms were alike, each could as well have
    had the other sign. Up to `EXACT_PROBLEMS` non-zero differences every pattern is counted;
    beyond, `permutations` random ones, with the observed one among them.

    >>> sign_flip_p_value(np.array([1.0, 1.0, 1.0, 1.0]))  # 2 of 16 patterns
    0.125
    """
    gap_N = np.asarray(gap_Q, dtype=np.float64)
    gap_N = gap_N[gap_N != 0.0]
    observed = abs(gap_N.sum())
    if len(gap_N) == 0:
        return 1.0
    threshold = observed - 1e-9 * np.abs(gap_N).sum()  # equal sums differ in rounding
    if len(gap_N) <= EXACT_PROBLEMS:
        signs_RN = np.array(list(product((-1.0, 1.0), repeat=len(gap_N))))
        return float(np.mean(np.abs(signs_RN @ gap_N) >= threshold))
    rng = generator("statistics", "signs", seed)
    as_large = 0
    for rows in _blocks(permutations, len(gap_N)):
        signs_RN = rng.integers(0, 2, size=(rows, len(gap_N)), dtype=np.int8) * 2.0 - 1.0
        as_large += int(np.count_nonzero(np.abs(signs_RN @ gap_N) >= threshold))
    return (1 + as_large) / (1 + permutations)


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


def minimum_detectable_effect(
    standard_error: float, *, significance: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true effect found with probability `power` by a two-sided test.

    (z_{1 - significance/2} + z_power) * standard_error, in the unit of standard_error.

    >>> round(minimum_detectable_effect(0.01), 4)
    0.028
    """
    return float((norm.ppf(1.0 - significance / 2.0) + norm.ppf(power)) * standard_error)


def resampled_means(*parts_SQ: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap means [R]: draw S seeds, then Q problems shared by all the seeds drawn.

    parts_SQ: one or more float [S, Q]; their means are added. Each part draws its own seeds
    (S may differ) and all parts the same problems. Drawing S seeds out of S shows only
    (S - 1)/S of their variance, a third too little for three seeds; the weights are stretched
    so that none is missing.
    """
    rng = generator("statistics", "bootstrap", seed)
    weights_RS = np.concatenate(
        [_seed_weights(len(part_SQ), resamples, rng) for part_SQ in parts_SQ], axis=1
    )
    score_SQ = np.concatenate(parts_SQ)
    return np.einsum("rs,rs->r", weights_RS, _resampled_problems(score_SQ, resamples, rng))


def _seed_weights(seeds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[R, S] weights summing to 1 per resample, with the variance of an unbiased estimate."""
    if seeds == 1:
        return np.ones((resamples, 1))
    counts_RS = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
    return 1.0 / seeds + (counts_RS - 1.0) / seeds * math.sqrt(seeds / (seeds - 1.0))


def _resampled_problems(
    score_SQ: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """[R, S] mean scores over Q problems drawn with replacement, the same for every seed."""
    seeds, problems = score_SQ.shape
    means_RS = np.empty((resamples, seeds))
    done = 0
    for rows in _blocks(resamples, problems * seeds):
        drawn_RQ = rng.integers(0, problems, size=(rows, problems))
        means_RS[done : done + rows] = score_SQ[:, drawn_RQ].mean(axis=2).T
        done += rows
    return means_RS


def _blocks(rows: int, row_elements: int) -> Iterator[int]:
    block = max(1, _CHUNK_ELEMENTS // max(1, row_elements))
    while rows > 0:
        yield min(block, rows)
        rows -= block


def _percentile_interval(means_R: np.ndarray) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(means_R, [tail, 1.0 - tail])
    return float(low), float(high)


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
