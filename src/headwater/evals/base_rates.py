"""What attempts at a few problems say of a model before anything is trained on them.

Pure and free of torch. Suffixes: Q problems, A attempts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headwater.evals.statistics import Estimate, avg_at_k, estimate, pass_at_k
from headwater.types import AttemptTable, Verdict


@dataclass(frozen=True, slots=True)
class Share:
    """A share of problems or attempts, or a difference of shares, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BaseRates:
    """What a model does with the problems before GRPO.

    pass_rate: avg@A. pass_at_k: at least one of the recipe's group size right. signal: groups
    whose rewards are not all equal. truncation, unparseable, timeout: shares of attempts.
    mean_tokens, longest_tokens: of a response.
    """

    pass_rate: Share
    pass_at_k: Share
    signal: Share
    truncation: float
    unparseable: float
    timeout: float
    mean_tokens: float
    longest_tokens: int

    @property
    def headroom(self) -> float:
        """What choosing among a group's attempts would add to the pass rate."""
        return self.pass_at_k.mean - self.pass_rate.mean


def base_rates(table: AttemptTable, group_size: int) -> BaseRates:
    """Rates of one model's attempts; group_size at most the attempts at each problem."""
    correct_QA = table.correct[0]
    return BaseRates(
        pass_rate=_share(avg_at_k(correct_QA)),
        pass_at_k=_share(pass_at_k(correct_QA, group_size)),
        signal=signal_share(correct_QA, group_size),
        truncation=float(table.truncated.mean()),
        unparseable=float((table.verdicts == Verdict.UNPARSEABLE.value).mean()),
        timeout=float((table.verdicts == Verdict.TIMEOUT.value).mean()),
        mean_tokens=float(table.response_tokens.mean()),
        longest_tokens=int(table.response_tokens.max()),
    )


def signal_share(correct_QA: np.ndarray, group_size: int) -> Share:
    """Share of groups that would hold both right and wrong attempts, without bias.

    A group of G drawn from A attempts of which c are right is all alike with probability
    [C(c, G) + C(A - c, G)] / C(A, G).

    >>> signal_share(np.array([[True, True, False, False]]), 2).mean.__round__(3)
    0.667
    """
    attempts = correct_QA.shape[1]
    draws = math.comb(attempts, group_size)
    alike = [
        math.comb(c, group_size) + math.comb(attempts - c, group_size) for c in range(attempts + 1)
    ]
    signal_by_right = np.array([1.0 - ways / draws for ways in alike])
    return _share(estimate(signal_by_right[correct_QA.sum(axis=1)][None]))


def _share(found: Estimate) -> Share:
    return Share(found.mean, found.low, found.high)
