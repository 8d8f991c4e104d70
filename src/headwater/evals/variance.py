"""How sure a mean over seeds and problems is: variance components and Student's t.

Seeds (training luck) and problems are both drawn by chance and are crossed: every seed meets
the same problems. The suffixes are those of `evals.statistics`.

With two to six seeds the variance between seeds is itself hardly known. `crossed_spread` was
calibrated on normal tables (2 to 6 seeds, 100 problems, any ratio of the three components):
the 95 % interval covers 94 to 99 %. It is widest where there is no training luck at all: a few
seeds cannot show that there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtrinc, ndtri, stdtr, stdtrit

from headwater.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard error of a mean and the degrees of freedom of its Student's t.

    seeds_share: share of the variance that comes from seeds; seeds_free: the seeds' own
    degrees of freedom, which govern the far tails.
    """

    standard_error: float
    degrees_of_freedom: float
    seeds_share: float = 0.0
    seeds_free: float = math.inf


def crossed_spread(*parts_SQ: np.ndarray) -> Spread:
    """Standard error and degrees of freedom of the sum of the parts' means.

    parts_SQ: float [S, Q], one for scores or seed-paired differences, two (first and -second)
    where each side has its own seeds; S may differ, the Q >= 2 problems are the same.

    Each part adds the variance of its seed means V_s = MS_seed / (S Q), all parts together
    that of the problem means V_q, and V_i = MS_interaction / (S Q) is in both (Searle, Casella
    and McCulloch, Variance Components, ch. 4). With every component kept from falling below 0,

        V = max(V_q, sum V_i) + sum max(V_s - V_i, 0).

    A part of one seed has V_s = V_i = 0: its luck cannot be seen, the claim is about this
    checkpoint. One seed in all leaves V = s^2 / Q and Q - 1 degrees of freedom.

    Satterthwaite (Biometrics 2, 1946) would put g^2 of the seeds' share g = sum V_s / V into
    1 / df. Seeds that look alike by chance then lower V and raise df together, and intervals
    over few seeds cover too little (88 % for two, 92 % for three). Here

        1 / df = g^p / df_s + (1 - g)^2 / (Q - 1),    p = 2 - 3 / (df_s + 1),

    with df_s Satterthwaite's for the seeds alone (S - 1 for one part). V_i is not taken off g:
    one cannot rule out luck because two or three seeds happen to agree.
    """
    problems = parts_SQ[0].shape[1]
    over_problems = _mean_variance(sum(part_SQ.mean(axis=0) for part_SQ in parts_SQ))
    several = [part_SQ for part_SQ in parts_SQ if len(part_SQ) > 1]
    if not several:
        return Spread(math.sqrt(over_problems), problems - 1.0)
    over_seeds_N = np.array([_mean_variance(part_SQ.mean(axis=1)) for part_SQ in several])
    interaction_N = np.array([_interaction_variance(part_SQ) for part_SQ in several])
    luck = float(np.maximum(over_seeds_N - interaction_N, 0.0).sum())
    variance = max(over_problems, float(interaction_N.sum())) + luck
    seen = float(over_seeds_N.sum())
    if seen == 0.0:
        return Spread(math.sqrt(variance), problems - 1.0)
    free_N = np.array([len(part_SQ) - 1.0 for part_SQ in several])
    seeds_free = 1.0 / float(np.sum((over_seeds_N / seen) ** 2 / free_N))
    share = min(seen / variance, 1.0)
    tempered = share ** (2.0 - 3.0 / (seeds_free + 1.0)) / seeds_free
    free = 1.0 / (tempered + (1.0 - share) ** 2 / (problems - 1.0))
    return Spread(math.sqrt(variance), free, share, seeds_free)


def _mean_variance(value_N: np.ndarray) -> float:
    """Variance of the mean of N values."""
    return float(value_N.var(ddof=1) / len(value_N))


def _interaction_variance(part_SQ: np.ndarray) -> float:
    """What is left after seed and problem means, as a variance of the grand mean."""
    rest_SQ = part_SQ - part_SQ.mean(axis=0) - part_SQ.mean(axis=1, keepdims=True)
    rest_SQ = rest_SQ + part_SQ.mean()
    seeds, problems = part_SQ.shape
    free = (seeds - 1) * (problems - 1)
    return float(np.sum(rest_SQ**2) / free / (seeds * problems))


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Student's t quantile; the normal one for infinite degrees of freedom.

    >>> round(t_quantile(0.975, 2.0), 3), round(t_quantile(0.975, math.inf), 3)
    (4.303, 1.96)
    """
    if math.isinf(degrees_of_freedom):
        return float(ndtri(probability))
    return float(stdtrit(degrees_of_freedom, probability))


def t_p_value(mean: float, spread: Spread) -> float:
    """Two-sided p-value of "the true mean is 0".

    >>> round(t_p_value(4.303, Spread(1.0, 2.0)), 3)
    0.05
    """
    return 2.0 * _tail(-abs(mean), spread)


def _tail(mean: float, spread: Spread) -> float:
    """How likely a mean this far down is by chance, when the true one is 0.

    The degrees of freedom are right at 5 %. Where Holm asks for 0.5 % they are too many: far
    out the few seeds' tails are all that is left, and studies of equal procedures would reject
    too often (8 % of families of ten at three seeds). So it is at least the seeds' share times
    the seeds' own tail.
    """
    reach = mean / spread.standard_error
    central = float(stdtr(spread.degrees_of_freedom, reach))
    far = float(stdtr(spread.seeds_free, reach)) if spread.seeds_share > 0.0 else 0.0
    return max(central, spread.seeds_share * far)


def at_least_p_value(difference: float, spread: Spread, margin: float) -> float:
    """One-sided p-value of "the true difference is -margin or less" (non-inferiority).

    For claims of the form "A is at least as good as B within `margin`": fix the margin before
    the study, take A - B, and make the claim when this p-value (after Holm, if there are
    several claims) is at most 0.05. A large p-value is no evidence that A is worse, and
    "cannot be told apart" is no evidence that A is as good. Both ways round, with A and B
    changed over, the two claims together say that A and B are equal within the margin (two
    one-sided tests, Schuirmann 1987). margin 0 is the one-sided test of "A is better".

    margin >= 0 in the unit of difference, standard_error > 0. Raises InputError otherwise.

    >>> round(at_least_p_value(0.0, Spread(0.01, math.inf), 0.02), 4)
    0.0228
    """
    if not (margin >= 0.0 and spread.standard_error > 0.0):
        raise InputError(
            f"margin={margin}, standard_error={spread.standard_error}; a margin is a loss that "
            "still counts as equal: give it as a number >= 0, and a standard error > 0"
        )
    return _tail(-(difference + margin), spread)


def minimum_detectable_effect(
    spread: Spread, *, significance: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true effect found with probability `power` by a two-sided `t_p_value`.

    d * standard_error, in its unit, where d solves P(T'(df, d) > c) = power for the noncentral
    t and c is where the p-value is `significance`; d = z_{1 - significance/2} + z_power with
    infinite df. (The sum of two central t quantiles falls short by a sixth with two degrees of
    freedom.)

    >>> round(minimum_detectable_effect(Spread(0.01, math.inf)), 4)
    0.028
    >>> round(minimum_detectable_effect(Spread(0.01, 2.0)), 4)
    0.0565
    """
    critical = t_quantile(1.0 - significance / 2.0, spread.degrees_of_freedom)
    if spread.seeds_share > significance:
        far = significance / spread.seeds_share
        critical = max(critical, t_quantile(1.0 - far / 2.0, spread.seeds_free))
    if math.isinf(spread.degrees_of_freedom):
        return (critical + float(ndtri(power))) * spread.standard_error
    reach = float(nctdtrinc(spread.degrees_of_freedom, 1.0 - power, critical))
    return reach * spread.standard_error
