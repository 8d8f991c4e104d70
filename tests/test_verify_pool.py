"""Workers: limits, kills, crashes; and the verifiers that run in them."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from headwater.errors import InputError, StageError
from headwater.types import Label, Verdict
from headwater.verify.pool import Ending, WorkerLimits, WorkerPool
from headwater.verify.verifiers import accepts_examples, make_verifier

TARGET = """
import os, time
from pathlib import Path

def act(command, argument):
    if command == "pid":
        time.sleep(float(argument))
        return os.getpid()
    if command == "loop":
        while True:
            pass
    if command == "sleep":
        time.sleep(float(argument))
        return argument
    if command == "die":
        os._exit(3)
    if command == "memory":
        return len("x" * int(argument))
    if command == "write":
        Path(argument).write_text("written")
    if command == "shell":
        os.system(argument)
    if command == "print":
        print("noise", flush=True)
    if command == "raise":
        raise ValueError(argument)
    if command == "list":
        return [argument]
    return command == argument

def half(completion, gold):
    return 0.5 if completion != gold else 1.0
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "grading_functions.py").write_text(TARGET)
    monkeypatch.syspath_prepend(tmp_path)
    return "grading_functions"


def test_a_hang_costs_its_own_case_and_time_only(target: str) -> None:
    pool = WorkerPool(f"{target}:act", 2, WorkerLimits(timeout_seconds=0.5))
    since = time.monotonic()
    outcomes = pool.run([("a", "a"), ("loop", ""), ("sleep", "60"), ("b", "c"), ("d", "d")])
    assert [outcome.ending for outcome in outcomes] == [
        Ending.RETURNED, Ending.OUT_OF_TIME, Ending.OUT_OF_TIME, Ending.RETURNED, Ending.RETURNED,
    ]  # fmt: skip
    assert [outcome.value for outcome in outcomes] == [True, None, None, False, True]
    assert 0.5 <= outcomes[1].seconds < 1.0
    assert time.monotonic() - since < 10
    pool.close()


def test_memory_crashes_errors_and_noise_stay_with_their_case(target: str) -> None:
    limits = WorkerLimits(timeout_seconds=5, memory_bytes=1 << 30)
    pool = WorkerPool(f"{target}:act", 1, limits)
    calls = [("memory", str(1 << 31)), ("die", ""), ("raise", "secret"), ("print", ""), ("e", "e")]
    outcomes = pool.run(calls)
    assert [outcome.ending for outcome in outcomes] == [
        Ending.OUT_OF_MEMORY, Ending.CRASHED, Ending.RAISED, Ending.RETURNED, Ending.RETURNED,
    ]  # fmt: skip
    assert outcomes[2].detail == "ValueError"
    assert "secret" not in repr(outcomes)
    assert outcomes[4].value is True
    pool.close()


@pytest.mark.parametrize("sealed", [True, False])
def test_no_file_can_be_written(target: str, tmp_path: Path, sealed: bool) -> None:
    pool = WorkerPool(f"{target}:act", 1, WorkerLimits(sealed=sealed))
    kept = tmp_path / "kept"
    kept.write_text("before")
    new = tmp_path / "new"
    calls = [("write", str(new)), ("shell", f"echo x > {new}")]
    endings = [outcome.ending for outcome in pool.run(calls)]
    pool.close()
    assert endings[0] is Ending.RAISED
    assert not new.exists() or not new.read_text()
    if sealed:
        assert endings[1] is Ending.RAISED
        assert not new.exists()


def test_killed_workers_lose_nothing(target: str) -> None:
    pool = WorkerPool(f"{target}:act", 2)
    pids = {outcome.value for outcome in pool.run([("pid", "0.1")] * 4)}
    assert len(pids) == 2

    def kill_one_after_the_other() -> None:
        for pid in pids:
            time.sleep(0.1)
            os.kill(int(pid or 0), signal.SIGKILL)

    killer = threading.Thread(target=kill_one_after_the_other)
    killer.start()
    outcomes = pool.run([("sleep", "0.05")] * 10 + [("a", "a"), ("a", "b")])
    killer.join()
    assert [outcome.value for outcome in outcomes] == ["0.05"] * 10 + [True, False]
    pool.close()


def test_a_worker_killed_between_batches_is_replaced(target: str) -> None:
    pool = WorkerPool(f"{target}:act")
    (outcome,) = pool.run([("pid", "0")])
    os.kill(int(outcome.value or 0), signal.SIGKILL)
    time.sleep(0.05)
    assert [outcome.value for outcome in pool.run([("a", "a"), ("b", "a")])] == [True, False]
    pool.close()


def test_large_texts_pass_and_too_long_ones_are_refused(target: str) -> None:
    pool = WorkerPool(f"{target}:act", 1, WorkerLimits(argument_characters=900_000))
    text = "é" * 400_000
    endings = [o.ending for o in pool.run([(text, text), (text, text * 2), ("\ud800", "\x00")])]
    assert endings == [Ending.RETURNED, Ending.TOO_LONG, Ending.RETURNED]
    pool.close()


def test_function_verifier(target: str) -> None:
    with make_verifier(f"python:{target}:half", timeout_seconds=5) as verifier:
        assert verifier.grade([("7", "7"), ("7", "8")]) == [Verdict.CORRECT, Verdict.INCORRECT]
        assert verifier.explain("7", "8").how == f"python:{target}:half returned 0.5"


def test_a_function_that_reads_another_form_refuses_the_examples(target: str) -> None:
    labels = [Label("p", "7", solution="3+4 = 7")]
    with make_verifier(f"python:{target}:half", timeout_seconds=5) as verifier:
        assert accepts_examples(verifier, "boxed", labels) is False
    with make_verifier("math") as verifier:
        assert accepts_examples(verifier, "boxed", labels) is True
        assert accepts_examples(verifier, "bare", labels) is False
        assert accepts_examples(verifier, "bare", [Label("p", "7")]) is None


def test_function_verifier_endings_are_their_own_verdicts(target: str) -> None:
    with make_verifier(f"python:{target}:act", timeout_seconds=0.5) as verifier:
        verdicts = verifier.grade([("loop", ""), ("raise", "secret"), ("a", "a")])
        assert verdicts == [Verdict.TIMEOUT, Verdict.UNPARSEABLE, Verdict.CORRECT]
        with pytest.raises(StageError, match="returned list where bool or float is expected"):
            verifier.grade([("list", "secret")])


@pytest.mark.parametrize("spec", ["python:grading_functions:missing", "python:no_such_module:f"])
def test_a_function_that_cannot_be_loaded_is_found_at_once(target: str, spec: str) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        make_verifier(spec)


@pytest.mark.parametrize("spec", ["maths", "python:", "python:module", "math:", "math:boxd", ""])
def test_unknown_verifiers_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"choose|use|drop"):
        make_verifier(spec)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_seconds": 0.0}])
def test_limits_must_be_positive(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="set"):
        make_verifier("math", **options)  # type: ignore[arg-type]


def test_math_verifier_explains_itself() -> None:
    with make_verifier("math:boxed,hash") as verifier:
        assert verifier.reads == {"boxed", "hash"}
        explanation = verifier.explain("#### 1/2", "0.5")
        assert (explanation.verdict, explanation.extracted) == (Verdict.CORRECT, "1/2")
        assert explanation.how == "compared as fractions"
        assert verifier.explain("so 4", "4").verdict is Verdict.UNPARSEABLE


def test_math_verifier_takes_algebra_to_its_workers() -> None:
    items = [(rf"\boxed{{{answer}}}", "1") for answer in (r"\sin^2 x+\cos^2 x", r"\sin^2 x", "1")]
    with make_verifier("math") as verifier:
        correct, wrong = Verdict.CORRECT, Verdict.INCORRECT
        assert verifier.grade(items) == [correct, wrong, correct]


def test_exact_verifier_does_no_algebra() -> None:
    with make_verifier("exact") as verifier:
        items = [(r"\boxed{ $x+1$ }", "x+1"), (r"\boxed{1+x}", "x+1"), ("x+1", "x+1")]
        assert verifier.grade(items) == [
            Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNPARSEABLE,
        ]  # fmt: skip
