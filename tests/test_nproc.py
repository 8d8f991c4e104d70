"""Runs whose stages several processes share: the table of one process, whoever is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headwater import api
from headwater.ledger import Ledger
from processes_seen import all_end, descendants
from small_study import HEADWATER, made, study_file

pytestmark = pytest.mark.slow
ARM = ["--arms", "half"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    api.run(study_file(folder, steps=3), folder / "run", quiet=True, arms=["half"])
    return folder / "run"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes a stage."""
    folder = tmp_path_factory.mktemp("shared")
    command = [*HEADWATER, study_file(folder, steps=3), "--out", folder / "run", *ARM]
    _finish(_begin([*command, "--nproc", "2"]))
    return folder / "run"


def test_two_processes_a_stage_end_with_the_table_of_one(alone: Path, shared: Path) -> None:
    assert _spent(shared) == _spent(alone)
    ours, theirs = made(shared), made(alone)
    assert ours.keys() == theirs.keys()
    assert ours["arms.csv"] == theirs["arms.csv"]


@pytest.mark.parametrize("victim", ["worker", "rank"])
def test_a_lost_process_changes_nothing(victim: str, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*HEADWATER, study_file(tmp_path, steps=3), "--out", out, *ARM, "--nproc", "2"]
    run = _begin([*command, "--set", "compute.retries=1"])
    while not _has_trained(out):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    (lost,) = (pid for pid in descendants(run.pid) if _does(pid, f"workflow.{victim} import"))
    os.kill(lost, signal.SIGKILL)
    said = _finish(run)
    assert "1 of 1 retries" in said
    assert made(out) == made(shared), "bit for bit"
    assert _spent(out) == _spent(shared)


def test_all_ranks_end_with_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = _begin([*HEADWATER, study_file(tmp_path, steps=300), "--out", out, *ARM, "--nproc", "2"])
    while not _has_trained(out):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    processes = descendants(run.pid)
    assert sum(_does(pid, "workflow.rank import") for pid in processes) == 1
    run.kill()
    run.communicate()
    assert all_end(processes, 20.0)


def test_torchrun_starts_the_same_run(shared: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "headwater", "run"]
    out = tmp_path / "run"
    command += [study_file(tmp_path, steps=3), "--out", out, *ARM]
    _finish(_begin(command))
    assert made(out) == made(shared), "bit for bit"
    _finish(_begin(command), 200.0)  # with nothing left to do: the other rank is let go


def test_ctrl_c_under_torchrun_saves(shared: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    out = tmp_path / "run"
    arguments = [study_file(tmp_path, steps=300), "--out", out, *ARM]
    run = _begin([*torchrun, "--nproc-per-node", "2", "-m", "headwater", "run", *arguments])
    while not _has_trained(out):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=200)[0]
    assert "run the same command again to continue" in said, said
    assert any(out.glob("checkpoints/*/steps/step-*/state.json"))


def _begin(command: list[Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(run: subprocess.Popen[str], within_seconds: float = 300.0) -> str:
    said = run.communicate(timeout=within_seconds)[0]
    assert run.returncode == 0, said
    return said


def _spent(out: Path) -> dict[str, float]:
    with Ledger(out / "ledger.sqlite") as ledger:
        found = ledger.spending().as_dict() | ledger.spending(kind="eval").as_dict()
    return {k: v for k, v in found.items() if k not in ("seconds", "peak_memory_bytes")}


def _has_trained(out: Path) -> bool:
    logs = out.glob("checkpoints/*/metrics.jsonl")
    return any("pass_rate" in log.read_text() for log in logs)


def _does(pid: int, words: str) -> bool:
    try:
        return words in (Path("/proc") / str(pid) / "cmdline").read_bytes().decode()
    except OSError:
        return False
