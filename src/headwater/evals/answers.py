"""What each attempt answered, and which attempts at a problem answered the same.

A is the number of attempts at one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np

from headwater.types import Verdict
from headwater.verify.equivalence import compare, same_text
from headwater.verify.extract import ANSWER_FORMS, AnswerForm, extract_first

NO_VOTE = -1


def forms_read(verifier: str) -> tuple[AnswerForm, ...]:
    """The answer forms that the verifier of this (valid) name looks for, in its order.

    A user's function reads whatever it likes: all forms are tried.

    >>> forms_read("math"), forms_read("exact:hash,boxed")
    (('boxed',), ('hash', 'boxed'))
    """
    kind, _, listed = verifier.partition(":")
    if kind in ("python", "reward"):
        return ANSWER_FORMS
    return cast("tuple[AnswerForm, ...]", tuple(listed.split(","))) if listed else ("boxed",)


def answer_of(response: str, verifier: str) -> str | None:
    """The final answer of a response as this verifier finds it; None where it gives none."""
    return extract_first(response, forms_read(verifier)) or None


def votes_of(answers_A: Sequence[str | None], verifier: str) -> list[int | None]:
    """For each attempt the number of the first one that answered the same; None for no answer.

    Two answers are the same where the verifier's comparison in this process says so (1/2 and
    0.5); what it leaves open is different. `exact` compares letters. An answer is compared with
    the first of each kind before it, so that the numbers do not depend on what comes after.

    >>> votes_of(["1/2", "3", None, "0.5"], "math")
    [0, 1, None, 0]
    """
    same = _same_letters if verifier.partition(":")[0] == "exact" else _same_value
    firsts: dict[str, int] = {}  # spelling -> number of the first attempt of its kind
    kinds: list[tuple[str, int]] = []
    votes: list[int | None] = []
    for attempt, answer in enumerate(answers_A):
        if answer is None:
            votes.append(None)
            continue
        if answer not in firsts:
            firsts[answer] = _find(answer, kinds, same, attempt)
            if firsts[answer] == attempt:
                kinds.append((answer, attempt))
        votes.append(firsts[answer])
    return votes


def ballots(votes_QA: np.ndarray) -> list[list[int | None]]:
    """Votes int [Q, A] with NO_VOTE for no answer, as `statistics.maj_at_k` takes them."""
    return [[None if vote == NO_VOTE else int(vote) for vote in row] for row in votes_QA]


def _find(
    answer: str,
    kinds: Sequence[tuple[str, int]],
    same: Callable[[str, str], bool],
    default: int,
) -> int:
    return next((number for first, number in kinds if same(answer, first)), default)


def _same_letters(answer: str, other: str) -> bool:
    return same_text(answer, other)


@lru_cache(maxsize=4096)
def _same_value(answer: str, other: str) -> bool:
    return compare(answer, other).verdict is Verdict.CORRECT
