"""Workers that are killed, stopped, flooded or crash, and what that costs."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headwater.types import Verdict
from headwater.verify.pool import Ending, WorkerLimits, WorkerPool
from headwater.verify.verifiers import Verifier, make_verifier
from processes_seen import children, misbehaving_pool, started_since

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


# One case each that must not cost the ones around it.


@pytest.mark.parametrize(
    ("command", "argument", "ending"),
    [
        ("die", "3", Ending.CRASHED),
        ("deep", "", Ending.CRASHED),
        ("kill itself", "", Ending.CRASHED),
        ("say", "garbage\n", Ending.CRASHED),
        ("say", '{"number": 99, "value": true}\n', Ending.CRASHED),
        ("say", "[1]\n", Ending.CRASHED),
        ("say", "[" * 100_000 + "\n", Ending.CRASHED),
        ("flood", "", Ending.CRASHED),
        ("close", "", Ending.CRASHED),
        ("leave", "0", Ending.RAISED),
        ("raise", "secret", Ending.RAISED),
        ("recurse", "x", Ending.TOO_DEEP),
        ("memory", str(1 << 31), Ending.OUT_OF_MEMORY),
        ("loop", "", Ending.OUT_OF_TIME),
        ("stop", "", Ending.OUT_OF_TIME),
        ("print", "20000", Ending.RETURNED),
        ("digits", "5000", Ending.RETURNED),
        ("text", str(1 << 22), Ending.RETURNED),
        ("text", "60000", Ending.RETURNED),
    ],
)
def test_one_bad_case_costs_itself_only(command: str, argument: str, ending: Ending) -> None:
    with misbehaving_pool(seconds=1.0, memory_bytes=1 << 30) as pool:
        before, bad, after = pool.run([("echo", "a"), (command, argument), ("echo", "b")])
    assert bad.ending is ending
    assert (before.value, after.value) == ("a", "b")
    assert "secret" not in repr(bad)


def test_a_reply_left_over_is_not_the_next_cases() -> None:
    forged = '{"number": 2, "value": "forged"}\n'
    with misbehaving_pool() as pool:
        outcomes = pool.run([("echo", "a"), ("say", forged * 3), ("echo", "b"), ("echo", "c")])
    assert [outcome.value for outcome in outcomes[2:]] == ["b", "c"]


def test_a_worker_that_speaks_unasked_is_replaced() -> None:
    with misbehaving_pool(2) as pool:
        outcomes = pool.run([("echo", str(i)) for i in range(50)] + [("say", "{}\n")] * 2)
        again = pool.run([("echo", str(i)) for i in range(50)])
    assert [outcome.value for outcome in outcomes[:50]] == [str(i) for i in range(50)]
    assert [outcome.value for outcome in again] == [str(i) for i in range(50)]


def test_requests_and_replies_larger_than_any_buffer() -> None:
    texts = ["é" * 300_000, "x" * 60_000, "\ud800\0\n"]
    with misbehaving_pool(2) as pool:
        outcomes = pool.run([("equal", f"{text}={text}") for text in texts] * 3)
        echoed = pool.run([("echo", text) for text in texts[1:]])
    assert all(outcome.value is True for outcome in outcomes)
    assert [outcome.value for outcome in echoed] == texts[1:]


def test_processor_time_is_limited_beside_the_clock() -> None:
    """Threads can use it up faster than the clock runs."""
    with misbehaving_pool(seconds=30.0) as pool:
        limit, used_up, after = pool.run([("cpu limit", ""), ("use up", ""), ("echo", "a")])
    assert limit.value in (32, 33)
    assert used_up.ending is Ending.OUT_OF_TIME
    assert used_up.seconds < 29
    assert after.value == "a"


def test_memory_that_earlier_cases_kept_is_not_held_against_the_next() -> None:
    with misbehaving_pool(memory_bytes=400 << 20) as pool:
        outcomes = pool.run([("keep", "200")] * 3 + [("memory", str(200 << 20))])
    assert [outcome.ending for outcome in outcomes] == [Ending.RETURNED] * 4


def test_a_replacement_takes_milliseconds() -> None:
    """A fresh interpreter with sympy takes a second, thirty times the limit of these cases."""
    pool = WorkerPool("headwater.verify.algebra:settle", 1, WorkerLimits(timeout_seconds=0.03))
    pool.run([("1", "1")])
    hang = (r"\sum_{k=1}^{10000000} \frac{1}{k^3}", "12")
    since = time.monotonic()
    outcomes = pool.run([hang, ("1", "1")] * 20)
    taken = time.monotonic() - since
    pool.close()
    assert [outcome.ending for outcome in outcomes] == [Ending.OUT_OF_TIME, Ending.RETURNED] * 20
    assert taken < 20 * 0.03 + 5


@pytest.mark.parametrize(("command", "argument"), [("die", "3"), ("say", "garbage\n")])
def test_a_case_that_ends_its_worker_is_tried_three_times(command: str, argument: str) -> None:
    with misbehaving_pool() as pool:
        (outcome,) = pool.run([("after 0.1 s", f"{command} {argument}")])
    assert outcome.ending is Ending.CRASHED
    assert 0.3 <= outcome.seconds < 1.5


def test_a_case_whose_worker_others_kill_is_tried_more_often() -> None:
    before = children(os.getpid())

    def kill(times: int) -> None:
        (server,) = started_since(before)
        for _ in range(times):
            time.sleep(0.1)
            for worker in children(server):
                os.kill(worker, signal.SIGKILL)

    with misbehaving_pool() as pool:
        pool.run([("echo", "a")])
        killer = threading.Thread(target=kill, args=(8,))
        killer.start()
        (outcome,) = pool.run([("sleep", "0.5")])
        killer.join()
    assert outcome.value == "0.5"


def test_every_worker_has_the_same_hash_seed() -> None:
    """sympy's choices follow the order of its sets."""
    with misbehaving_pool() as pool:
        assert pool.run([("environment", "PYTHONHASHSEED")])[0].value == "0"


# Kills from outside, in the middle of batches.

EQUAL = [
    (r"\sin^2 x+\cos^2 x", "1"), (r"\sin(2x)", r"2\sin x\cos x"), (r"e^{\ln 3}", "3"),
    (r"\frac{1}{1+\tan^2 x}", r"\cos^2 x"), (r"\ln(xy)", r"\ln x+\ln y"),
]  # fmt: skip
COMMON = [("18", "18"), ("0.5", r"\frac12"), ("x^2+2x+1", "(x+1)^2"), (r"2\sqrt{2}", r"\sqrt 8")]


def _mixed(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    items = []
    for _ in range(count):
        answer, gold = rng.choice(EQUAL if rng.random() < 0.2 else COMMON)
        if rng.random() < 0.3:
            answer += "+1"
        items.append((rf"so \boxed{{{answer}}}" if rng.random() < 0.95 else "nothing", gold))
    return items


MIXED = _mixed(300)
_KILLS = 10


@contextmanager
def _killer(seed: int, gap_seconds: float, before: list[int]) -> Iterator[list[int]]:
    """SIGKILL a random worker, now and then its server, at seeded times, ten in all."""
    rng = random.Random(seed)
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while len(killed) < _KILLS and not done.wait(rng.uniform(0.2, 1.8) * gap_seconds):
            servers = started_since(before)
            workers = [pid for server in servers for pid in children(server)]
            pool = servers if rng.random() < 0.05 else workers
            if pool:
                killed.append(rng.choice(pool))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def quiet() -> list[Verdict]:
    """Verdicts of one worker that nobody disturbs."""
    with make_verifier("math") as verifier:
        return verifier.grade(MIXED)


def _disturbed(
    verifier: Verifier,
    items: list[tuple[str, str]],
    seed: int,
    gap_seconds: float,
    before: list[int],
) -> set[tuple[Verdict, ...]]:
    """All lists of verdicts that came out, over as many batches as the kills take."""
    found = set()
    with _killer(seed, gap_seconds, before) as killed:
        while len(killed) < _KILLS:
            found.add(tuple(verifier.grade(items)))
    return found


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_kills_change_no_verdict_of_math(workers: int, quiet: list[Verdict]) -> None:
    assert {Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNPARSEABLE} == set(quiet)
    before = children(os.getpid())
    with make_verifier("math", workers=workers) as verifier:
        verifier.explain(r"\boxed{\sin^2 x+\cos^2 x}", "1")
        assert _disturbed(verifier, MIXED, workers, 0.15, before) == {tuple(quiet)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_kills_change_no_verdict_of_a_function(workers: int) -> None:
    rng = random.Random(1)
    items = [(f"{0.003 * workers}:{rng.randrange(2)}", "1") for _ in range(300)]
    expected = [Verdict.CORRECT if text[-1] == "1" else Verdict.INCORRECT for text, _ in items]
    before = children(os.getpid())
    with make_verifier("python:grading_targets:judge", workers=workers) as verifier:
        assert _disturbed(verifier, items, workers, 0.07, before) == {tuple(expected)}


def test_verdicts_do_not_depend_on_workers_or_order(quiet: list[Verdict]) -> None:
    order = list(range(len(MIXED)))
    random.Random(2).shuffle(order)
    with make_verifier("math", workers=4) as verifier:
        shuffled = verifier.grade([MIXED[place] for place in order])
    assert [quiet[place] for place in order] == shuffled


# What never reaches a worker, and what always does.


def test_short_answers_start_no_worker_and_long_ones_are_never_compared_here() -> None:
    before = children(os.getpid())
    with make_verifier("math") as verifier:
        assert verifier.grade([(r"\boxed{1/2}", "0.5")]) == [Verdict.CORRECT]
        assert started_since(before) == []
        long = "+".join(["1"] * 600)
        assert verifier.grade([(rf"\boxed{{{long}}}", "600")]) == [Verdict.CORRECT]
        assert len(started_since(before)) == 1
        assert verifier.explain(r"\boxed{" + "x" * 60_000 + "}", "1").verdict is Verdict.UNPARSEABLE
