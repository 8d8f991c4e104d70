"""Bootstrap over seeds and problems, and the permutation test over problems; pure and seeded.

The suffixes are those of `evals.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
from scipy.special import expit, logit

from headwater.evals.variance import CONFIDENCE, Spread, t_quantile
from headwater.seeding import generator

RESAMPLES = 10_000
EXACT_PROBLEMS = 14  # up to here all 2^Q sign patterns are enumerated
_CHUNK_ELEMENTS = 2_000_000  # bounds the memory of one block of resamples


def calibrated_interval(means_R: np.ndarray, mean: float, spread: Spread) -> tuple[float, float]:
    """95 % interval with the shape of the bootstrap and the width of Student's t.

    means_R: `resampled_means`. Its percentiles say how the width 2 t SE is divided between the
    two sides of the mean. The bootstrap's own width is not used: resampling three seeds has no
    t tails, and resampling seeds and problems counts their interaction three times (Owen,
    arXiv:0712.1111).
    """
    below, above = _reaches(means_R, mean, spread)
    return mean - below, mean + above


def calibrated_share_interval(
    means_R: np.ndarray, mean: float, spread: Spread
) -> tuple[float, float]:
    """`calibrated_interval` on the logit scale, for a mean strictly between 0 and 1.

    Reaches are divided by the logit's slope, mean * (1 - mean). Near 0 and 1 the percentiles
    show a third of the skew that Student's t needs (Hall, Annals of Statistics 16, 1988), and
    training luck is skewed too: at 90 % the plain interval covers 90 to 92 %, this one 93 to 97.
    """
    below, above = _reaches(means_R, mean, spread)
    slope = mean * (1.0 - mean)
    center = logit(mean)
    return float(expit(center - below / slope)), float(expit(center + above / slope))


def _reaches(means_R: np.ndarray, mean: float, spread: Spread) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(means_R, [tail, 1.0 - tail])
    below, above = max(mean - float(low), 0.0), max(float(high) - mean, 0.0)
    share_above = above / (above + below) if above + below > 0.0 else 0.5
    width = 2.0 * t_quantile(1.0 - tail, spread.degrees_of_freedom) * spread.standard_error
    return (1.0 - share_above) * width, share_above * width


def resampled_means(*parts_SQ: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap means [R]: draw S seeds, then Q problems shared by all the seeds drawn.

    parts_SQ: one or more float [S, Q]; their means are added. Each part draws its own seeds
    (S may differ) and all parts the same problems. Drawing S seeds out of S shows only
    (S - 1)/S of their variance, a third too little for three seeds; the weights are stretched
    so that none is missing, and mirrored in half of the draws, because the skew of a few seeds
    is noise.
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
    mirror_R = rng.integers(0, 2, size=(resamples, 1)) * 2.0 - 1.0
    stretch = math.sqrt(seeds / (seeds - 1.0))
    return 1.0 / seeds + mirror_R * (counts_RS - 1.0) / seeds * stretch


def _resampled_problems(
    score_SQ: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """[R, S] mean scores over Q problems drawn with replacement, the same for every seed."""
    seeds, problems = score_SQ.shape
    means_RS = np.empty((resamples, seeds))
    done = 0
    for rows in _blocks(resamples, problems):
        drawn_RQ = rng.integers(0, problems, size=(rows, problems))
        drawn_RQ += np.arange(rows)[:, None] * problems
        count_RQ = np.bincount(drawn_RQ.ravel(), minlength=rows * problems).reshape(rows, problems)
        means_RS[done : done + rows] = count_RQ.astype(np.float64) @ score_SQ.T / problems
        done += rows
    return means_RS


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


def _blocks(rows: int, row_elements: int) -> Iterator[int]:
    block = max(1, _CHUNK_ELEMENTS // max(1, row_elements))
    while rows > 0:
        yield min(block, rows)
        rows -= block
