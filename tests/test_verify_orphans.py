"""What is left running when a caller, a fork server or a worker ends; and callers that fork."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headwater.verify.pool import Ending, WorkerLimits, WorkerPool
from processes_seen import (
    TARGET,
    all_end,
    children,
    descendants,
    misbehaving_pool,
    runs_with,
    started_since,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


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
    with misbehaving_pool(2, seconds=30.0) as pool:
        pool.run([("echo", "a")] * 2)
        (server,) = started_since(before)
        workers = children(server)
        killer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
        killer.start()
        outcomes = pool.run([("sleep", "0.6")] * 2 + [("echo", "b")] * 20)
        killer.join()
        assert all_end([server, *workers])
    assert [outcome.value for outcome in outcomes] == ["0.6"] * 2 + ["b"] * 20


def test_a_stopped_fork_server_is_replaced() -> None:
    before = children(os.getpid())
    with misbehaving_pool(seconds=0.3) as pool:
        pool.run([("echo", "a")])
        (server,) = started_since(before)
        os.kill(server, signal.SIGSTOP)
        pool._servers[0]._start_seconds = 0.5  # else it is waited for as long as a start may take
        outcomes = pool.run([("loop", ""), ("echo", "b")])
    assert outcomes[0].ending is Ending.OUT_OF_TIME
    assert outcomes[1].value == "b"
    assert all_end([server])


def test_what_a_case_started_ends_with_its_worker() -> None:
    seconds = f"61.{random.SystemRandom().randrange(10**9)}"
    with misbehaving_pool(seconds=0.5, memory_bytes=8 << 30) as pool:
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
