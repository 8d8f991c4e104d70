"""Workers between the runs of one program: which are kept, taken again, and kept apart."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwater import api
from headwater.workflow import executor, kept_workers
from headwater.workflow.held_worker import HeldWorker
from headwater.workflow.kept_workers import KeptWorkers
from headwater.workflow.launch import launch_worker
from headwater.workflow.messages import Call, Done, WorkerSetup
from headwater.workflow.store import worker_lock
from test_api_stages import GRPO, SUMS, few_letters


@pytest.fixture
def kept() -> Iterator[KeptWorkers]:
    found = KeptWorkers()
    yield found
    found.close()


def a_run(folder: Path, **settings: Any) -> WorkerSetup:
    folder.mkdir()
    return WorkerSetup(folder, "nothing:runs", **settings)


def started(setup: WorkerSetup) -> HeldWorker:
    return HeldWorker(setup, launch_worker)


def called(worker: HeldWorker, target: str, *arguments: Any) -> Any:
    """What a function returns in the worker."""
    worker.tell(Call(target, arguments))
    reply = worker.connection.recv()
    if not isinstance(reply, Done):
        raise reply.error()
    return reply.value


def lock_is_free(folder: Path) -> bool:
    with worker_lock(folder).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_worker_serves_one_run_after_another(kept: KeptWorkers, tmp_path: Path) -> None:
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second")
    worker = started(first)
    pid = called(worker, "os:getpid")
    called(worker, "builtins:print", "of the first")
    assert not lock_is_free(first.run_dir)
    assert kept.keep(worker)
    assert lock_is_free(first.run_dir)

    again = kept.take(second)
    assert again is worker and kept.take(second) is None
    called(again, "builtins:print", "of the second")
    assert called(again, "os:getpid") == pid
    assert not lock_is_free(second.run_dir)
    logs = [run.run_dir / "logs" / "worker-0.log" for run in (first, second)]
    assert [log.read_text() for log in logs] == ["of the first\n", "of the second\n"]
    again.quit()
    again.end(10.0)


@pytest.mark.parametrize(
    "other", [{"threads": 2}, {"deterministic": True}, {"variable": "1"}, {"path": "elsewhere"}]
)
def test_a_run_in_other_surroundings_starts_its_own(
    kept: KeptWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    assert kept.keep(started(a_run(tmp_path / "first")))
    settings = {key: value for key, value in other.items() if key in ("threads", "deterministic")}
    if "variable" in other:
        monkeypatch.setenv("HEADWATER_TEST_VARIABLE", other["variable"])
    if "path" in other:
        monkeypatch.syspath_prepend(str(tmp_path))
    assert kept.take(a_run(tmp_path / "second", **settings)) is None


def test_a_folder_changed_means_another_worker(
    kept: KeptWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept.keep(started(a_run(tmp_path / "first")))
    monkeypatch.chdir(tmp_path)
    assert kept.take(a_run(tmp_path / "second")) is None


def test_a_worker_with_somebodys_module_ends(
    kept: KeptWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys.py").write_text("def value():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = started(a_run(tmp_path / "first"))
    assert called(worker, "somebodys:value") == 1
    assert not kept.keep(worker)
    worker.end(10.0)
    assert worker.gone


def test_a_busy_worker_is_not_kept(kept: KeptWorkers, tmp_path: Path) -> None:
    worker = started(a_run(tmp_path / "first"))
    worker.stage = "in hand"
    assert not kept.keep(worker)
    worker.quit()
    worker.end(10.0)


def test_few_rest_and_the_oldest_leaves(kept: KeptWorkers, tmp_path: Path) -> None:
    workers = [started(a_run(tmp_path / str(n), threads=1, number=n)) for n in range(3)]
    assert all(kept.keep(worker) for worker in workers)
    assert [worker.gone for worker in workers] == [True, False, False]


def test_one_that_has_gone_or_may_go_is_not_taken(
    kept: KeptWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = started(a_run(tmp_path / "first"))
    assert kept.keep(worker)
    with monkeypatch.context() as later:
        later.setattr(kept_workers, "IDLE_SECONDS", 0.0)
        assert kept.take(a_run(tmp_path / "second")) is None
    worker._process.kill()
    worker._process.wait()
    assert kept.take(a_run(tmp_path / "third")) is None


def test_a_resting_worker_ends_with_its_program(kept: KeptWorkers, tmp_path: Path) -> None:
    worker = started(a_run(tmp_path / "first"))
    assert kept.keep(worker)
    worker.connection.close()
    worker._process.wait(10.0)


def test_a_forked_child_leaves_them_alone(kept: KeptWorkers, tmp_path: Path) -> None:
    worker = started(a_run(tmp_path / "first"))
    assert kept.keep(worker)
    kept._owner = os.getppid()  # as in a child of the process that keeps them
    assert kept.take(a_run(tmp_path / "second")) is None
    assert not worker.gone
    worker.connection.close()
    deadline = time.monotonic() + 10.0
    while not worker.gone and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker.gone


def test_stages_called_one_after_another_share_a_worker_and_compute_the_same(
    tmp_path: Path,
) -> None:
    found = []
    for name in ("first", "second"):
        record = api.grpo("tiny:student", SUMS, few_letters, **GRPO, out=tmp_path / name)
        (resting,) = executor.KEPT._resting[-1:]
        found.append((resting.worker._process.pid, record.model.joinpath("model.safetensors")))
    (first, before), (second, after) = found
    assert first == second and before != after
    assert before.read_bytes() == after.read_bytes()
