"""Which attempts at a problem answered the same.

A is the number of attempts at one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

NO_VOTE = -1

#: Whether the two answers of each pair are the same.
SameAnswers = Callable[[Sequence[tuple[str, str]]], list[bool]]


def votes_of(answers_A: Sequence[str | None], same_answers: SameAnswers) -> list[int | None]:
    """For each attempt the number of the first one that answered the same; None for no answer.

    An answer is compared with the first of each kind before it, so that the numbers do not
    depend on what comes after.

    >>> equal = lambda pairs: [float(one) == float(other) for one, other in pairs]
    >>> votes_of(["0.5", "3", None, "0.50"], equal)
    [0, 1, None, 0]
    """
    spellings = list(dict.fromkeys(answer for answer in answers_A if answer is not None))
    pairs = list(combinations(spellings, 2))
    same = dict(zip(pairs, same_answers(pairs), strict=True)) if pairs else {}
    kinds: list[str] = []
    kind_of: dict[str, str] = {}
    for spelling in spellings:
        kind_of[spelling] = next((k for k in kinds if same[k, spelling]), spelling)
        if kind_of[spelling] == spelling:
            kinds.append(spelling)
    first = {kind: list(answers_A).index(kind) for kind in kinds}
    return [None if answer is None else first[kind_of[answer]] for answer in answers_A]


def ballots(votes_QA: np.ndarray) -> list[list[int | None]]:
    """Votes int [Q, A] with NO_VOTE for no answer, as `statistics.maj_at_k` takes them."""
    return [[None if vote == NO_VOTE else int(vote) for vote in row] for row in votes_QA]
