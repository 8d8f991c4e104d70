"""What one model's attempts at one set of problems amount to; pure.

Q problems, A attempts. Every estimate is over problems (`evals.statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from headwater.errors import InputError
from headwater.evals import statistics
from headwater.evals.answers import ballots
from headwater.evals.statistics import Estimate
from headwater.types import AttemptTable, Problem, Verdict


@dataclass(frozen=True, slots=True)
class PartScore:
    """The scores on the problems of one level or subject."""

    name: str
    problems: int
    avg_at_k: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate


@dataclass(frozen=True, slots=True)
class Score:
    """One model on one set, k attempts at each problem.

    pass_at: by the number of attempts that one of which is right, powers of two and k itself.
    solved_once, solved_always: share of problems with one right attempt, and with all of them.
    The other shares are of attempts; tokens are those of responses. levels, subjects: where the
    problems have more than one.
    """

    problems: int
    attempts: int
    avg_at_k: Estimate
    pass_at: dict[int, Estimate]
    maj_at_k: Estimate
    solved_once: float
    solved_always: float
    truncated_share: float
    unparseable_share: float
    timeout_share: float
    mean_response_tokens: float
    median_response_tokens: float
    max_response_tokens: int
    levels: tuple[PartScore, ...]
    subjects: tuple[PartScore, ...]


def score(table: AttemptTable, problems: Sequence[Problem]) -> Score:
    """The scores of a table of one seed with votes; `problems` are its problems in its order.

    Raises InputError for a table of other problems, of several seeds or without votes.
    """
    if table.votes is None or len(table.seeds) != 1:
        raise InputError(
            f"attempts with {len(table.seeds)} seeds and {'no' if table.votes is None else ''} "
            "votes; expected one seed and the column vote: evaluate again"
        )
    if table.problem_ids != tuple(problem.id for problem in problems):
        raise InputError("the attempts are at other problems; evaluate again in another folder")
    correct_QA, tokens_QA = table.correct[0], table.response_tokens[0]
    votes_QA = ballots(table.votes[0])
    attempts = correct_QA.shape[1]
    verdicts = table.verdicts

    def parts(name_of: Callable[[Problem], Hashable | None]) -> tuple[PartScore, ...]:
        return _parts([name_of(problem) for problem in problems], correct_QA, votes_QA)

    return Score(
        problems=len(problems),
        attempts=attempts,
        avg_at_k=statistics.avg_at_k(correct_QA),
        pass_at={k: statistics.pass_at_k(correct_QA, k) for k in draws(attempts)},
        maj_at_k=statistics.maj_at_k(votes_QA, correct_QA),
        solved_once=float(correct_QA.any(axis=1).mean()),
        solved_always=float(correct_QA.all(axis=1).mean()),
        truncated_share=float(table.truncated.mean()),
        unparseable_share=float(np.mean(verdicts == Verdict.UNPARSEABLE.value)),
        timeout_share=float(np.mean(verdicts == Verdict.TIMEOUT.value)),
        mean_response_tokens=float(tokens_QA.mean()),
        median_response_tokens=float(np.median(tokens_QA)),
        max_response_tokens=int(tokens_QA.max()),
        levels=parts(lambda problem: problem.level),
        subjects=parts(lambda problem: problem.subject),
    )


def draws(attempts: int) -> list[int]:
    """The k of pass@k: powers of two up to the attempts, and all of them.

    >>> draws(1), draws(4), draws(6)
    ([1], [1, 2, 4], [1, 2, 4, 6])
    """
    return sorted({2**power for power in range(attempts.bit_length())} | {attempts})


def majority_of(votes_A: Sequence[int | None]) -> int | None:
    """The number of the attempt that first gave the most frequent answer; of several as frequent
    the one given first. None where nothing was answered.

    >>> majority_of([0, 1, 1, 0, None])
    0
    """
    cast = [vote for vote in votes_A if vote is not None]
    return min(cast, key=lambda vote: (-cast.count(vote), vote), default=None)


def _parts(
    names: Sequence[Hashable | None], correct_QA: np.ndarray, votes_QA: list[list[int | None]]
) -> tuple[PartScore, ...]:
    """Scores by name, in the order of names; problems without one are under `none`."""
    known = {name for name in names if name is not None}
    if len(known) < 2:
        return ()
    ordered: list[Hashable | None] = sorted(known)  # type: ignore[type-var]
    ordered += [None] if None in names else []
    found = []
    for name in ordered:
        places = [place for place, given in enumerate(names) if given == name]
        part_QA = correct_QA[places]
        found.append(
            PartScore(
                name="none" if name is None else str(name),
                problems=len(places),
                avg_at_k=statistics.avg_at_k(part_QA),
                pass_at_k=statistics.pass_at_k(part_QA, part_QA.shape[1]),
                maj_at_k=statistics.maj_at_k([votes_QA[place] for place in places], part_QA),
            )
        )
    return tuple(found)
