"""Whole stages whose rollouts and teacher scores come from vLLM servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from headwater.config.compute import VLLM, Compute, InProcess
from headwater.config.distillation import TopK
from headwater.config.evaluation import Evaluation
from headwater.config.stages import GRPOStage, OPDStage, TeacherRolloutsStage
from headwater.rollout.vllm_process import ServerProcess
from processes_seen import all_end, children, descendants
from stage_jobs import SAMPLING, Run, make_job

GRPO = GRPOStage(steps=3, prompts_per_step=4, group_size=4, lr=3e-3)


def _compute(**engines: Any) -> Compute:
    return Compute(device="cpu", precision="float32", **engines)


def _asking(server: ServerProcess, **settings: Any) -> VLLM:
    """An engine of the shared server's."""
    return VLLM(urls=(server.url,), requests_in_flight=16, **settings)


@pytest.fixture
def student_engine(student_server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> VLLM:
    monkeypatch.setenv("VLLM_API_KEY", student_server.key)
    return _asking(student_server)


@pytest.fixture
def teacher_engine(teacher_server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> VLLM:
    monkeypatch.setenv("VLLM_API_KEY", teacher_server.key)
    return _asking(teacher_server)


def _grpo(folder: Path, student: Path, rollouts: Any, config: GRPOStage = GRPO) -> Run:
    compute = _compute(rollouts=rollouts)
    job = make_job("grpo", config, folder, model_dir=student, compute=compute)
    return Run(job, labels=True)


def test_grpo_learns_from_servers_as_it_does_from_its_own_process(
    tmp_path: Path, student: Path, student_engine: VLLM
) -> None:
    config = GRPOStage(steps=14, prompts_per_step=10, group_size=8, lr=1e-3)
    theirs = _grpo(tmp_path / "vllm", student, student_engine, config).start()
    ours = _grpo(tmp_path / "ours", student, InProcess(), config).start()
    learned = []
    for run in (theirs, ours):
        rows = run.metrics()
        assert max(row["sampler_gap"] for row in rows) < 1e-4  # weights of another step: over 0.01
        rewards = [row["reward"] for row in rows]
        learned.append(np.mean(rewards[7:]) - np.mean(rewards[:2]))
    assert min(learned) > 0.03 and abs(learned[0] - learned[1]) < 0.12
    for name in ("reward", "response_tokens", "entropy"):  # other samples, of the same policy
        first, other = (run.metrics()[0][name] for run in (theirs, ours))
        assert abs(first - other) < 0.25 * max(1.0, abs(other)), name
    assert theirs.spent()["labels"] == ours.spent()["labels"]
    left = sorted(path.name for path in theirs.job.output_dir.iterdir())
    assert left == sorted(path.name for path in ours.job.output_dir.iterdir())


class KillsServers(list[Mapping[str, Any]]):
    """Progress of a stage; once a step is done, the stage's own server is killed."""

    killed: tuple[int, ...] = ()

    def append(self, values: Mapping[str, Any]) -> None:
        super().append(values)
        if not self.killed and values["step"] == 1:
            before = descendants(os.getpid())
            words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in before}
            self.killed = tuple(p for p, said in words.items() if b"own-server" in said)
            leader = next(p for p in self.killed if b"supervise.py" in words[p])
            (server,) = children(leader)
            os.kill(server, signal.SIGKILL)


@pytest.mark.parametrize("transfer", ["folder", "ipc"])
def test_a_server_killed_in_the_middle_changes_nothing(
    tmp_path: Path, student: Path, student_engine: VLLM, transfer: Any
) -> None:
    expected = _grpo(tmp_path / "undisturbed", student, student_engine).start()
    own = VLLM(
        python=os.environ["VLLM_PYTHON"],
        extra_args=("--served-model-name", "own-server"),
        transfer=transfer,
    )
    run = _grpo(tmp_path / "killed", student, own)
    run.progress = progress = KillsServers()
    run.start()
    assert progress.killed and all_end(list(progress.killed))
    log = (run.job.checkpoint_dir / "vllm-rollouts" / "server.log").read_text(encoding="utf-8")
    assert log.count("--- ") == 2  # started twice
    assert [row["response"] for row in run.rollouts()] == [
        row["response"] for row in expected.rollouts()
    ]
    ours, theirs = (load_file(r.model_dir / "model.safetensors") for r in (run, expected))
    assert all(np.allclose(ours[n].numpy(), theirs[n].numpy(), atol=1e-4) for n in ours)
    assert not [p for p in descendants(os.getpid()) if b"own-server" in _words(p)]


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_opd_with_a_served_teacher_has_the_gradients_of_a_local_one(
    tmp_path: Path,
    student: Path,
    teacher: Path,
    teacher_engine: VLLM,
) -> None:
    config = OPDStage(steps=2, prompts_per_step=4, group_size=2, lr=3e-3, targets=TopK(k=8))
    runs = {}
    for name, scoring in (("served", teacher_engine), ("local", InProcess())):
        job = make_job(
            "opd",
            config,
            tmp_path / name,
            model_dir=student,
            teacher_dir=teacher,
            compute=_compute(scoring=scoring),
        )
        runs[name] = Run(job).start()
    served, local = (runs[name].metrics() for name in ("served", "local"))
    for one, other in zip(served, local, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert runs["served"].spent() == pytest.approx(runs["local"].spent())


@pytest.mark.parametrize("transfer", ["folder", "broadcast", "ipc"])
def test_opd_end_to_end_with_servers_for_both(
    tmp_path: Path,
    student: Path,
    teacher: Path,
    student_server: ServerProcess,
    teacher_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    transfer: str,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", student_server.key)
    monkeypatch.setenv("TEACHER_API_KEY", teacher_server.key)
    config = OPDStage(steps=8, prompts_per_step=8, group_size=4, lr=3e-3, targets=TopK(k=16))
    compute = _compute(
        rollouts=_asking(student_server, transfer=transfer),
        scoring=_asking(teacher_server, transfer=transfer, key_variable="TEACHER_API_KEY"),
    )
    job = make_job("opd", config, tmp_path, model_dir=student, teacher_dir=teacher, compute=compute)
    metrics = Run(job).start().metrics()
    written = list(job.checkpoint_dir.rglob("vllm-rollouts/weights/*.safetensors"))
    assert bool(written) == (transfer == "folder")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert max(row["sampler_gap"] for row in metrics) < 1e-4


def test_teacher_rollouts_and_their_targets_from_one_server(
    tmp_path: Path, teacher: Path, teacher_engine: VLLM
) -> None:
    config = TeacherRolloutsStage(
        rollouts_per_prompt=2, targets=TopK(k=16), sampling=SAMPLING, prompts_per_batch=4
    )
    runs = {}
    for name, scoring in (("served", teacher_engine), ("local", InProcess())):
        compute = _compute(rollouts=teacher_engine, scoring=scoring)
        job = make_job(
            "teacher_rollouts", config, tmp_path / name, teacher_dir=teacher, compute=compute
        )
        runs[name] = Run(job).start()
    assert runs["served"].rollouts() == runs["local"].rollouts()
    for part in sorted(runs["local"].job.output_dir.glob("targets-*.safetensors")):
        ours, theirs = load_file(part), load_file(runs["served"].job.output_dir / part.name)
        assert ours.keys() == theirs.keys()
        assert np.allclose(ours["logprobs_TK"], theirs["logprobs_TK"], atol=1e-4)
        assert (ours["ids_TK"] == theirs["ids_TK"]).float().mean() > 0.98


def test_an_evaluation_by_servers_is_as_good(
    tmp_path: Path, student: Path, student_engine: VLLM
) -> None:
    rates = {}
    for name, engine in (("served", student_engine), ("local", InProcess())):
        job = make_job(
            "evaluate",
            Evaluation(attempts=16),
            tmp_path / name,
            model_dir=student,
            compute=_compute(rollouts=engine),
            options={"verifier": "exact"},
        )
        run = Run(job, labels=True).start()
        rates[name] = run.metrics()[0]["pass_rate"]
    assert abs(rates["served"] - rates["local"]) < 0.2  # 160 attempts each: five errors of 0.04
