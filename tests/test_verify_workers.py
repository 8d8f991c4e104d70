"""Workers that are killed, stopped, flooded, or crash; and what is left when their parent ends."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headwater.types import Verdict
from headwater.verify.pool import Ending, WorkerLimits, WorkerPool
from headwater.verify.verifiers import Verifier, make_verifier
from processes_seen import all_end, children, descendants, runs_with

TARGET = "grading_targets:act"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")

pytestmark = LINUX


@contextmanager
def _pool(workers: int = 1, seconds: float = 5.0, **limits: int | bool) -> Iterator[WorkerPool]:
    settings = WorkerLimits(timeout_seconds=seconds, **{"sealed": False, **limits})  # type: ignore[arg-type]
    pool = WorkerPool(TARGET, workers, settings)
    try:
        yield pool
    finally:
        pool.close()


def _servers(before: list[int]) -> list[int]:
    """Processes that this one has started since."""
    return [pid for pid in children(os.getpid()) if pid not in before]


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
    with _pool(seconds=1.0, memory_bytes=1 << 30) as pool:
        before, bad, after = pool.run([("echo", "a"), (command, argument), ("echo", "b")])
    assert bad.ending is ending
    assert (before.value, after.value) == ("a", "b")
    assert "secret" not in repr(bad)


def test_a_reply_left_over_is_not_the_next_cases() -> None:
    forged = '{"number": 2, "value": "forged"}\n'
    with _pool() as pool:
        outcomes = pool.run([("echo", "a"), ("say", forged * 3), ("echo", "b"), ("echo", "c")])
    assert [outcome.value for outcome in outcomes[2:]] == ["b", "c"]


def test_a_worker_that_speaks_unasked_is_replaced() -> None:
    with _pool(2) as pool:
        outcomes = pool.run([("echo", str(i)) for i in range(50)] + [("say", "{}\n")] * 2)
        again = pool.run([("echo", str(i)) for i in range(50)])
    assert [outcome.value for outcome in outcomes[:50]] == [str(i) for i in range(50)]
    assert [outcome.value for outcome in again] == [str(i) for i in range(50)]


def test_requests_and_replies_larger_than_any_buffer() -> None:
    texts = ["é" * 300_000, "x" * 60_000, "\ud800\0\n"]
    with _pool(2) as pool:
        outcomes = pool.run([("equal", f"{text}={text}") for text in texts] * 3)
        echoed = pool.run([("echo", text) for text in texts[1:]])
    assert all(outcome.value is True for outcome in outcomes)
    assert [outcome.value for outcome in echoed] == texts[1:]


def test_processor_time_is_limited_beside_the_clock() -> None:
    """Threads can use it up faster than the clock runs."""
    with _pool(seconds=30.0) as pool:
        limit, used_up, after = pool.run([("cpu limit", ""), ("use up", ""), ("echo", "a")])
    assert limit.value in (32, 33)
    assert used_up.ending is Ending.OUT_OF_TIME
    assert used_up.seconds < 29
    assert after.value == "a"


def test_memory_that_earlier_cases_kept_is_not_held_against_the_next() -> None:
    with _pool(memory_bytes=400 << 20) as pool:
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
    with _pool() as pool:
        (outcome,) = pool.run([("after 0.1 s", f"{command} {argument}")])
    assert outcome.ending is Ending.CRASHED
    assert 0.3 <= outcome.seconds < 1.5


def test_a_case_whose_worker_others_kill_is_tried_more_often() -> None:
    before = children(os.getpid())

    def kill(times: int) -> None:
        (server,) = _servers(before)
        for _ in range(times):
            time.sleep(0.1)
            for worker in children(server):
                os.kill(worker, signal.SIGKILL)

    with _pool() as pool:
        pool.run([("echo", "a")])
        killer = threading.Thread(target=kill, args=(8,))
        killer.start()
        (outcome,) = pool.run([("sleep", "0.5")])
        killer.join()
    assert outcome.value == "0.5"


# Ends and orphans.


def _left_by(script: str, *, kill: bool) -> list[int]:
    """Run a script that prints a line once its pool is at work; end it; return its processes."""
    code = f"from headwater.verify.pool import *\nimport os, sys, threading, time\n{script}"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "at work\n"
    time.sleep(0.2)
    left = descendants(process.pid)
    if kill:
        process.kill()
    process.stdin.close()
    process.wait(timeout=10)
    process.stdout.close()
    return left


BUSY = f"""
pool = WorkerPool({TARGET!r}, 2, WorkerLimits(timeout_seconds=60, sealed=False))
pool.run([("echo", "a")] * 2)
threading.Thread(target=pool.run, args=([("loop", "")],), daemon=True).start()
time.sleep(0.2)
"""


def test_nothing_outlives_a_killed_parent() -> None:
    left = _left_by(f"{BUSY}print('at work', flush=True)\nsys.stdin.read()", kill=True)
    assert len(left) == 3
    assert all_end(left)


def test_nothing_outlives_a_killed_parent_whose_sockets_live_on_in_a_fork() -> None:
    script = f"""{BUSY}
if os.fork() == 0:
    os.close(0), os.close(1), os.setsid()
    time.sleep(5)
    os._exit(0)
print('at work', flush=True)
sys.stdin.read()"""
    left = _left_by(script, kill=True)
    assert len(left) == 4
    assert _ended(left, 3, within_seconds=4.0)


def _ended(pids: list[int], count: int, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while sum(all_end([pid], 0.0) for pid in pids) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_nothing_outlives_a_parent_that_exits_without_closing() -> None:
    left = _left_by(f"{BUSY}print('at work', flush=True)\nsys.stdin.read()", kill=False)
    assert len(left) == 3
    assert all_end(left)


def test_workers_end_with_their_fork_server_and_the_batch_goes_on() -> None:
    before = children(os.getpid())
    with _pool(2, seconds=30.0) as pool:
        pool.run([("echo", "a")] * 2)
        (server,) = _servers(before)
        workers = children(server)
        killer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
        killer.start()
        outcomes = pool.run([("sleep", "0.6")] * 2 + [("echo", "b")] * 20)
        killer.join()
        assert all_end([server, *workers])
    assert [outcome.value for outcome in outcomes] == ["0.6"] * 2 + ["b"] * 20


def test_a_stopped_fork_server_is_replaced() -> None:
    before = children(os.getpid())
    with _pool(seconds=0.3) as pool:
        pool.run([("echo", "a")])
        (server,) = _servers(before)
        os.kill(server, signal.SIGSTOP)
        pool._servers[0]._start_seconds = 0.5  # else it is waited for as long as a start may take
        outcomes = pool.run([("loop", ""), ("echo", "b")])
    assert outcomes[0].ending is Ending.OUT_OF_TIME
    assert outcomes[1].value == "b"
    assert all_end([server])


def test_what_a_case_started_ends_with_its_worker() -> None:
    seconds = f"61.{random.SystemRandom().randrange(10**9)}"
    with _pool(seconds=0.5, memory_bytes=8 << 30) as pool:
        (outcome,) = pool.run([("child", seconds)])
    assert outcome.ending is Ending.OUT_OF_TIME
    time.sleep(0.1)
    assert not runs_with(seconds)


def test_a_module_that_starts_threads_is_imported_by_each_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threaded_target.py").write_text(
        "import concurrent.futures\n"
        "pool = concurrent.futures.ThreadPoolExecutor(1)\n"
        "pool.submit(int).result()\n"
        "def double(text, _):\n"
        "    return pool.submit(lambda: text + text).result()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = WorkerPool("threaded_target:double", 2, WorkerLimits(timeout_seconds=5, sealed=False))
    outcomes = pool.run([("a", "")] * 6)
    pool.close()
    assert [outcome.value for outcome in outcomes] == ["aa"] * 6


def test_a_forked_copy_of_the_caller_has_workers_of_its_own() -> None:
    script = f"""
import os
from headwater.verify.pool import WorkerLimits, WorkerPool
pool = WorkerPool({TARGET!r}, 2, WorkerLimits(sealed=False))
pids = lambda: {{outcome.value for outcome in pool.run([("pid", "0.1")] * 2)}}
before = pids()
child = os.fork()
if child == 0:
    theirs = pids()
    pool.close()
    os._exit(len(theirs) != 2 or bool(theirs & before))
assert os.waitpid(child, 0)[1] == 0
assert len(before) == 2 and pids() == before
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=30)


def test_a_function_in_the_working_folder_is_found_and_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def same(completion, gold):\n    return completion == gold\n"
    )
    (tmp_path / "json.py").write_text("raise ImportError('the wrong json')\n")
    script = """
from headwater.verify.verifiers import make_verifier
with make_verifier("python:mine:same") as verifier:
    assert verifier.explain("a", "a").verdict == "correct"
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-P", "-c", script]
    subprocess.run(command, env=environment, check=True, timeout=30, cwd=tmp_path)


def test_every_worker_has_the_same_hash_seed() -> None:
    """sympy's choices follow the order of its sets."""
    with _pool() as pool:
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


@contextmanager
def _killer(seed: int, gap_seconds: float, before: list[int]) -> Iterator[list[int]]:
    """SIGKILL a random worker, now and then its server, at seeded times."""
    rng = random.Random(seed)
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.wait(rng.uniform(0.2, 1.8) * gap_seconds):
            servers = _servers(before)
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
    """All lists of verdicts that came out, over as many batches as it takes for six kills."""
    found = set()
    with _killer(seed, gap_seconds, before) as killed:
        while len(killed) < 6:
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
        assert _servers(before) == []
        long = "+".join(["1"] * 600)
        assert verifier.grade([(rf"\boxed{{{long}}}", "600")]) == [Verdict.CORRECT]
        assert len(_servers(before)) == 1
        assert verifier.explain(r"\boxed{" + "x" * 60_000 + "}", "1").verdict is Verdict.UNPARSEABLE
