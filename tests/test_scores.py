"""Answers that vote, and what one model's attempts amount to: against plain loops."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from headwater.errors import InputError
from headwater.evals.answers import ballots, votes_of
from headwater.evals.scores import draws, majority_of, score
from headwater.types import AttemptTable, Problem
from headwater.verify.verifiers import make_verifier


@pytest.mark.parametrize(
    ("answers", "votes"),
    [
        (["4", "4.0", "5", r"\frac{8}{2}"], [0, 0, 2, 0]),
        (["1/2", None, "0.5", r"\frac12", "50\\%"], [0, None, 0, 0, 0]),
        (["x+1", "1+x", "blue", "Blue "], [0, 0, 2, 2]),
        (["1,000", "1000", "(1, 0)", "(1,0)"], [0, 0, 2, 2]),
        ([None, None], [None, None]),
        ([r"\frac{", r"\frac{", "}{"], [0, 0, 2]),
    ],
)
def test_the_same_number_is_one_vote(answers: list[str | None], votes: list[int | None]) -> None:
    with make_verifier("math") as verifier:
        assert votes_of(answers, verifier.same_answers) == votes


def test_exact_verifiers_tell_spellings_apart() -> None:
    answers = ["1/2", "0.5", "$1/2$", "1/2"]
    assert votes_of(answers, make_verifier("exact").same_answers) == [0, 1, 0, 0]


def test_who_votes_together_does_not_depend_on_the_order() -> None:
    answers = ["0.5", "3", "1/2", "blue", None]
    sizes = set()
    with make_verifier("math") as verifier:
        for order in permutations(answers):
            votes = votes_of(order, verifier.same_answers)
            sizes.add(tuple(sorted(votes.count(vote) for vote in set(votes))))
    assert sizes == {(1, 1, 1, 2)}


def test_the_majority_is_the_most_frequent_and_then_the_first() -> None:
    assert majority_of([0, 1, 1, None]) == 1
    assert majority_of([0, 1, 1, 0]) == 0
    assert majority_of([None]) is None


# --- scores ---------------------------------------------------------------------------------------


def make_table(attempts: int = 4, problems: int = 9, *, votes: bool = True) -> AttemptTable:
    rng = np.random.default_rng(attempts)
    kinds = np.array(["correct", "incorrect", "unparseable", "timeout"])
    verdicts = kinds[rng.choice(4, size=(1, problems, attempts), p=[0.4, 0.4, 0.1, 0.1])]
    cast = np.where(verdicts == "unparseable", -1, (verdicts != "correct").astype(int))
    return AttemptTable(
        problem_ids=tuple(f"p{number}" for number in range(problems)),
        seeds=(0,),
        verdicts=verdicts,
        response_tokens=rng.integers(5, 99, size=verdicts.shape).astype(np.int32),
        truncated=rng.random(verdicts.shape) < 0.3,
        votes=cast.astype(np.int32) if votes else None,
    )


def make_problems(count: int = 9, **fields: object) -> list[Problem]:
    return [Problem(f"p{n}", "?", "s", n % 3 or None, ["even", "odd"][n % 2]) for n in range(count)]


@pytest.mark.parametrize("attempts", [1, 4, 6])
def test_scores_equal_plain_loops(attempts: int) -> None:
    table = make_table(attempts)
    found = score(table, make_problems())
    correct = table.correct[0].tolist()
    assert list(found.pass_at) == draws(attempts)
    for k, estimate in found.pass_at.items():
        subsets = [[any(one) for one in combinations(row, k)] for row in correct]
        expected = np.mean([np.mean(one) for one in subsets])
        assert estimate.mean == pytest.approx(expected, abs=1e-12)
    assert found.avg_at_k.mean == pytest.approx(np.mean(correct))
    assert found.pass_at[1].mean == pytest.approx(found.avg_at_k.mean)
    majority = []
    for row in ballots(table.votes[0]):  # type: ignore[index]
        right, wrong = row.count(0), row.count(1)  # the right answer is always 0
        majority.append(0.5 if right == wrong > 0 else float(right > wrong))
    assert found.maj_at_k.mean == pytest.approx(np.mean(majority))
    assert found.solved_once == np.mean([any(row) for row in correct])
    assert found.solved_always == np.mean([all(row) for row in correct])
    tokens = table.response_tokens.ravel().tolist()
    assert found.mean_response_tokens == pytest.approx(sum(tokens) / len(tokens))
    assert found.median_response_tokens == np.median(tokens)
    assert found.max_response_tokens == max(tokens)
    verdicts = table.verdicts.ravel().tolist()
    assert found.unparseable_share == verdicts.count("unparseable") / len(verdicts)
    assert found.timeout_share == verdicts.count("timeout") / len(verdicts)


def test_levels_and_subjects_divide_the_problems() -> None:
    table, problems = make_table(), make_problems()
    found = score(table, problems)
    assert [(part.name, part.problems) for part in found.levels] == [
        ("1", 3),
        ("2", 3),
        ("none", 3),
    ]
    assert [(part.name, part.problems) for part in found.subjects] == [("even", 5), ("odd", 4)]
    for parts in (found.levels, found.subjects):
        whole = sum(part.problems * part.avg_at_k.mean for part in parts) / 9
        assert whole == pytest.approx(found.avg_at_k.mean)
    alike = [Problem(problem.id, "?", "s", 3, None) for problem in problems]
    assert score(table, alike).levels == score(table, alike).subjects == ()


def test_scores_of_other_attempts_are_refused() -> None:
    with pytest.raises(InputError, match="expected one seed and the column vote"):
        score(make_table(votes=False), make_problems())
    with pytest.raises(InputError, match="at other problems"):
        score(make_table(), make_problems()[::-1])
