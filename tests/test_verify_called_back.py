"""Reward functions of the calling process: called from workers, named by what they are made of."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from headwater.errors import InputError, StageError
from headwater.types import Label, Verdict
from headwater.verify.called_back import offer
from headwater.verify.grading import Grade
from headwater.verify.reward_calls import needed_columns
from headwater.verify.verifiers import make_verifier
from headwater.verify.weighted import WeightedRewards


def grades(
    function: Callable[..., Any], texts: list[str], timeout_seconds: float = 5.0, **row: Any
) -> list[Grade]:
    label = Label("p", "", row={"prompt": "q", **row})
    with make_verifier(offer(function, "mine"), timeout_seconds=timeout_seconds) as verifier:
        return verifier.examine([(text, label) for text in texts])


def test_a_closure_is_called_here_with_columns_and_prompts() -> None:
    calls = []

    def reward(prompts: list[str], completions: list[str], wanted: list[str]) -> list[float]:
        calls.append((os.getpid(), prompts, wanted))
        return [float(text == want) for text, want in zip(completions, wanted, strict=True)]

    found = grades(reward, ["up", "down"], wanted="up")
    assert [grade.reward for grade in found] == [1.0, 0.0]
    assert calls == [(os.getpid(), ["q", "q"], ["up", "up"])]


def test_what_raises_is_shown_once_and_costs_itself_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    found = grades(reward, ["a", "", "bb", ""])
    assert [grade.verdict for grade in found] == [
        Verdict.CORRECT,
        Verdict.UNPARSEABLE,
        Verdict.INCORRECT,
        Verdict.UNPARSEABLE,
    ]
    assert capfd.readouterr().err.count("ZeroDivisionError: division by zero") == 1


def test_what_always_raises_ends_the_stage() -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(StageError, match=r"raised KeyError at test_verify_called_back.py:.*every"):
        grades(reward, ["a"] * 20)


def test_a_call_that_takes_too_long_is_given_up() -> None:
    release = threading.Event()

    def reward(completions: list[str], **columns: Any) -> list[float]:
        if "hang" in completions:
            release.wait(20)
        return [1.0 for _ in completions]

    began = time.monotonic()
    found = grades(reward, ["fine", "hang"], timeout_seconds=0.5)
    release.set()
    assert [grade.verdict for grade in found] == [Verdict.CORRECT, Verdict.TIMEOUT]
    assert time.monotonic() - began < 10


def test_a_function_of_another_process_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"gone@0 is a function of a Python process that is not"):
        make_verifier("called:gone@0")


def test_functions_that_take_no_completions_are_refused() -> None:
    with pytest.raises(TypeError, match="a reward function takes completions"):
        offer(lambda texts: texts, "mine")


def longer(than: int) -> Callable[..., list[float]]:
    def reward(completions: list[str]) -> list[float]:
        return [float(len(text) > than) for text in completions]

    return reward


LIMIT = 3


def within_limit(completions: list[str]) -> list[float]:
    return [float(len(text) < LIMIT) for text in completions]


class Shorter:
    def __init__(self, than: int) -> None:
        self.than = than

    def __call__(self, completions: list[str]) -> list[float]:
        return [float(len(text) < self.than) for text in completions]


def test_the_name_follows_what_the_function_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert offer(longer(2), "f") == offer(longer(2), "f") != offer(longer(3), "f")
    assert offer(Shorter(2), "f") == offer(Shorter(2), "f") != offer(Shorter(3), "f")
    weighted = [offer(WeightedRewards([longer(2)], [w]), "f") for w in (1.0, 2.0)]
    assert weighted[0] != weighted[1]
    before = offer(within_limit, "f")
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert offer(within_limit, "f") != before


def test_several_functions_are_a_weighted_sum() -> None:
    async def judged(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if text == "skip" else 1.0 for text in completions]

    def never(completions: list[str], score: list[float]) -> list[float | None]:
        return [None if text == "skip" else s for text, s in zip(completions, score, strict=True)]

    both = WeightedRewards([judged, never], [0.5, 2.0])
    found = grades(both, ["a", "skip"], score=3.0)
    assert [grade.reward for grade in found] == [6.5, 0.0]
    assert found[1].verdict is Verdict.UNPARSEABLE
    lengths = WeightedRewards([longer(1), judged])
    assert [grade.reward for grade in grades(lengths, ["skip", "bb"])] == [1.0, 2.0]


def test_columns_that_a_function_cannot_do_without() -> None:
    def reward(prompts: Any, completions: Any, answer: Any, level: int = 1, **rest: Any) -> None:
        return None

    assert needed_columns(reward) == {"answer"}


class _Rater:
    def __call__(self, completions: list[str]) -> list[float]:
        return [self.rate(text) for text in completions]

    def rate(self, text: str) -> float:
        return _worth(text)


class _Heir(_Rater):
    pass


def _worth(text: str) -> float:
    return _UNIT * len(text)


_UNIT = 1.0


@pytest.mark.parametrize(
    "function", [_Rater(), _Heir(), _Rater().__call__], ids=["object", "heir", "method"]
)
def test_what_the_methods_of_a_called_object_use_is_part_of_its_name(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = offer(function, "mine")
    assert offer(function, "mine") == before
    monkeypatch.setitem(globals(), "_UNIT", 2.0)
    assert offer(function, "mine") != before
