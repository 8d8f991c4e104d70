"""The embedded task: chains, traces, difficulty, determinism and every option's error."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.models.tiny import tiny_tokenizer
from headwater.tasks import arithmetic
from headwater.tasks.problems import load_problems
from headwater.tasks.prompts import encode_prompt, encode_response
from headwater.types import Verdict
from headwater.verify.verifiers import make_verifier

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
OPTIONS = arithmetic.parse_options({"steps": "2-4", "modulus": "10"})


def _chain(start: int, *operations: tuple[str, int], modulus: int = 10) -> arithmetic.Chain:
    return arithmetic.Chain(start, operations, modulus, room=len(operations))


def _value(start: int, operations: list[tuple[str, int]], modulus: int) -> int:
    """What the chain is worth, by Python's own arithmetic."""
    for symbol, operand in operations:
        start = OPERATORS[symbol](start, operand) % modulus
    return start


def test_a_worked_chain() -> None:
    chain = _chain(7, ("+", 5), ("*", 3), ("-", 4))
    assert chain.answer == 2
    rng = np.random.default_rng(0)
    assert arithmetic.trace(chain, "worked", rng) == "7+5=2*3=6-4=2\n\\boxed{2}"
    assert _chain(1, ("-", 5)).answer == 6  # never below zero
    assert _chain(4, ("*", 6), modulus=7).answer == 3


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_every_worked_trace_is_right_step_by_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chain = arithmetic.draw_chain(rng, OPTIONS)
    assert 2 <= len(chain.operations) <= 4
    assert 0 <= chain.start < 10 and all(2 <= operand <= 9 for _, operand in chain.operations)
    assert chain.answer == _value(chain.start, list(chain.operations), 10)
    work, box = arithmetic.trace(chain, "worked", rng).split("\n")
    assert box == f"\\boxed{{{chain.answer}}}"
    value = chain.start
    steps = re.findall(r"([-+*])(\d)=(\d)", work)
    assert work == f"{chain.start}" + "".join(f"{op}{by}={now}" for op, by, now in steps)
    for (symbol, operand), (op, by, now) in zip(chain.operations, steps, strict=True):
        assert (op, int(by)) == (symbol, operand)
        value = _value(value, [(symbol, operand)], 10)
        assert int(now) == value


def test_a_careless_trace_follows_from_its_slips() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(300):
        chain = arithmetic.draw_chain(rng, OPTIONS)
        text = arithmetic.trace(chain, "careless", rng, slip_rate=0.2)
        values = [int(now) for now in re.findall(r"=(\d)", text)]
        assert text.endswith(f"\\boxed{{{values[-1]}}}")  # honest about its own last value
        value, slips = chain.start, 0
        for (symbol, operand), now in zip(chain.operations, values, strict=True):
            slips += now != _value(value, [(symbol, operand)], 10)
            value = now
        wrong += slips > 0
    assert 0.3 < wrong / 300 < 0.65  # 1 - 0.8 ** 3 is 0.49
    chain = arithmetic.draw_chain(rng, OPTIONS)
    assert arithmetic.trace(chain, "careless", rng) == arithmetic.trace(chain, "worked", rng)


def test_a_guess_shows_no_work_and_is_uniform() -> None:
    rng = np.random.default_rng(2)
    chain = _chain(1, ("+", 2))
    texts = [arithmetic.trace(chain, "guessed", rng) for _ in range(2000)]
    counts = [texts.count(f"\\boxed{{{digit}}}") for digit in range(10)]
    assert sum(counts) == 2000 and min(counts) > 140


def test_shares_of_qualities() -> None:
    rng = np.random.default_rng(3)
    drawn = [arithmetic.draw_quality(rng, 0.5, 0.3) for _ in range(4000)]
    shares = [drawn.count(quality) / 4000 for quality in ("worked", "careless", "guessed")]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


# --- as a source of problems --------------------------------------------------------------------


def test_problems_are_distinct_right_graded_and_the_same_every_time() -> None:
    data = load_problems("task:arithmetic?steps=1-3&count=200&seed=5")
    again = load_problems("task:arithmetic?steps=1-3&count=200&seed=5")
    assert data == again and data.data_hash == again.data_hash
    assert len({problem.prompt for problem in data.problems}) == 200
    assert {problem.level for problem in data.problems} == {1, 2, 3}
    for problem, label in zip(data.problems, data.labels, strict=True):
        operations = re.findall(r"([-+*])(\d)", problem.prompt)
        assert len(operations) == problem.level
        start = int(problem.prompt[0])
        steps = [(symbol, int(operand)) for symbol, operand in operations]
        assert label.answer == str(_value(start, steps, 10))
        assert label.solution is not None and label.solution.endswith(f"{{{label.answer}}}")
    other = load_problems("task:arithmetic?steps=1-3&count=200&seed=6")
    assert {p.prompt for p in other.problems} != {p.prompt for p in data.problems}
    assert other.data_hash != data.data_hash


def test_more_problems_begin_with_the_same_ones() -> None:
    few = load_problems("task:arithmetic?steps=2&count=20")
    many = load_problems("task:arithmetic?steps=2&count=60")
    assert many.problems[:20] == few.problems


@pytest.mark.parametrize("spec", ["exact", "math"])
def test_worked_solutions_are_accepted_and_wrong_ones_are_not(spec: str) -> None:
    data = load_problems("task:arithmetic?steps=2-3&count=8&modulus=12")
    right = [(str(label.solution), label.answer) for label in data.labels]
    wrong = [(text, str(int(answer) + 1)) for text, answer in right]
    with make_verifier(spec) as verifier:
        assert set(verifier.grade(right)) == {Verdict.CORRECT}
        assert set(verifier.grade(wrong)) == {Verdict.INCORRECT}


def test_the_embedded_models_can_read_and_write_all_of_it() -> None:
    tokenizer = tiny_tokenizer()
    data = load_problems("task:arithmetic?steps=1-4&count=50&modulus=100")
    for problem, label in zip(data.problems, data.labels, strict=True):
        prompt = encode_prompt(tokenizer, problem, "bare")
        assert problem.prompt in tokenizer.decode(prompt)
        response = encode_response(tokenizer, problem, str(label.solution))
        assert tokenizer.decode(response, skip_special_tokens=True) == label.solution
        assert response[-1] == tokenizer.eos_token_id


def test_the_sign_of_an_operation_survives_the_source_line() -> None:
    only_plus = load_problems("task:arithmetic?steps=2&count=20&operations=+")
    assert all(set(p.prompt) & set("+-*") == {"+"} for p in only_plus.problems)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("level=3", r"unknown option 'level'; choose from steps, count"),
        ("steps=0-2", r"steps=0-2; expected 1 <= LOW <= HIGH <= 20"),
        ("steps=4-2", r"steps=4-2; expected 1 <= LOW <= HIGH"),
        ("steps=a", r"steps is LOW-HIGH, others integers"),
        ("count=0", r"count=0; expected at least 1"),
        ("count=many", r"others integers"),
        ("operations=/", r"operations='/'; expected some of \+ - \*"),
        ("modulus=1", r"modulus=1; expected 2 to 100"),
        ("steps=1&count=100&modulus=2", r"count=100 but only \d+ distinct problems"),
    ],
)
def test_bad_options_are_named(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_problems(f"task:arithmetic?{options}")
