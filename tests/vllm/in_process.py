"""Real stages with vLLM in their own process; run by `test_vllm_in_process.py`.

In the interpreter that has vLLM, with src and tests on its path: a folder to write in, the
models of student and teacher, and a file of requests. Writes what it saw to results.json.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import distributed

from headwater.config.compute import VLLM, Compute, InProcess
from headwater.config.distillation import TopK
from headwater.config.stages import GRPOStage, OPDStage, TeacherRolloutsStage
from headwater.engine.forward import load_engine_model
from headwater.errors import StageError
from headwater.models.saving import once_each, save_weights
from headwater.rollout.vllm_process import ServerSettings
from headwater.rollout.vllm_servers import Servers, StaleWeights
from headwater.rollout.vllm_weights import LiveWeights
from stage_jobs import SAMPLING, Run, make_job

HERE = VLLM(in_process=True)
VOCAB = 60


def _state() -> dict[str, Any]:
    """What of this process a trainer rests on, or hands on to its children."""
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "random": [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "processors": sorted(os.sched_getaffinity(0)),
        "formats": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "patched": [
            str(vars(owner).get(name))
            for owner, name in (
                (torch, "set_num_threads"),
                (torch, "Event"),
                (torch.Tensor, "pin_memory"),
                (torch.Tensor, "record_stream"),
                (torch.accelerator, "synchronize"),
            )
        ],
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "hooks": [str(sys.excepthook), str(threading.excepthook), sys.getrecursionlimit()],
        "loggers": {
            name: [one.level, str(one.handlers), one.propagate]
            for name in ("", "transformers", "httpx2", "torch")
            for one in [logging.getLogger(name)]
        },
        "collector": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "group": distributed.is_initialized(),
    }


def _changed(before: dict[str, Any]) -> list[str]:
    now = _state()
    return [name for name in before if now[name] != before[name]]


def _resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4 // 1024


class Scenes:
    """What is tried, one method each; they share the models and the folder."""

    def __init__(self, folder: Path, student: Path, teacher: Path, bodies: list[Any]) -> None:
        self.folder, self.student, self.teacher = folder, student, teacher
        self.bodies = bodies

    def _servers(self, name: str, *, dtype: str = "float32") -> Servers:
        settings = ServerSettings(
            model=self.student,
            log=self.folder / name / "server.log",
            dtype=dtype,
            on_cpu=True,
            threads=torch.get_num_threads(),
        )
        return Servers(HERE, settings, VOCAB)

    @contextmanager
    def _idle_engine(self) -> Iterator[None]:
        with self._servers("idle") as idle:
            idle.load(self.student, 0)
            yield

    def _run(self, kind: str, config: Any, name: str, **engines: Any) -> Run:
        compute = Compute(device="cpu", precision="float32", **engines)
        models = {"model_dir": self.student, "teacher_dir": self.teacher}
        if kind == "grpo":
            del models["teacher_dir"]
        if kind == "teacher_rollouts":
            del models["model_dir"]
        job = make_job(kind, config, self.folder / name, compute=compute, **models)
        return Run(job, labels=kind == "grpo")

    def process(self) -> dict[str, Any]:
        """An engine's whole life leaves the process as it was, and frees its memory."""
        logging.getLogger("httpx2")
        before = _state()
        with self._servers("life") as servers:
            servers.load(self.student, 0)
            while_idle = _changed(before)
            answers = servers.ask(self.bodies)
            servers.load(self.student, 1)
            again = servers.ask(self.bodies)
            while_used = _changed(before)
            held = _resident_mib()
        return {
            "changed": {"idle": while_idle, "used": while_used, "after": _changed(before)},
            "answers": answers,
            "same": [a["choices"][0]["token_ids"] for a in answers]
            == [a["choices"][0]["token_ids"] for a in again],
            "freed_mib": held - _resident_mib(),
        }

    def weights(self) -> dict[str, Any]:
        """Half-loaded and foreign weights."""
        found: dict[str, Any] = {}
        with self._servers("weights") as servers:
            servers.load(self.student, 0)
            try:
                servers.load(self.folder / "nowhere", 1)
            except StageError as error:
                found["unreadable"] = str(error)
            (client,) = servers._clients
            engine = client._engine  # type: ignore[union-attr]
            found["version"] = engine.get_weight_version()
            servers.load(self.student, 2)
            servers._after_load = lambda: engine.set_weight_version("another")
            servers._after_load()
            try:
                servers.ask(self.bodies[:2])
            except StaleWeights as error:
                found["stale"] = str(error)
        return found

    def memory(self) -> dict[str, Any]:
        """Weights from memory and from a folder, in both formats; the trainer trains on."""
        return {name: self._memory(name) for name in ("float32", "bfloat16")}

    def _memory(self, dtype: str) -> dict[str, Any]:
        model = load_engine_model(self.student, getattr(torch, dtype), torch.device("cpu"))
        version, random = 0, torch.Generator().manual_seed(1)
        state = dict(model.named_parameters(remove_duplicate=False))
        written = self.folder / f"written-{dtype}" / "model.safetensors"
        found: dict[str, Any] = {"tied": len(state) - len(once_each(state))}

        def train() -> None:
            nonlocal version
            version += 1
            with torch.no_grad():
                for weight in model.parameters():
                    noise = torch.randn(weight.shape, generator=random)
                    weight += 0.3 * weight.std() * noise.to(weight.dtype)

        def lent() -> LiveWeights:
            tensors = once_each(state)
            return LiveWeights(lambda: iter(tensors.items()), lambda: version, version)

        with self._servers(f"memory-{dtype}", dtype=dtype) as servers:
            servers.load(self.student, 0)
            found["first"] = servers.ask(self.bodies)
            train()
            servers.load(lent(), 1)
            found["lent"] = servers.ask(self.bodies)
            save_weights(state, written)
            (client,) = servers._clients
            client._engine.set_weight_version("another")  # type: ignore[union-attr]
            found["again"] = servers.ask(self.bodies)
            train()
            found["kept"] = servers.ask(self.bodies)
            client._engine.set_weight_version("another")  # type: ignore[union-attr]
            try:
                servers.ask(self.bodies[:2])
            except StaleWeights as error:
                found["stale"] = str(error)
            servers.load(written.parent, 3)
            found["written"] = servers.ask(self.bodies)
        return found

    def grpo(self) -> dict[str, Any]:
        """Rollouts in the trainer's process, followed for some steps, resumed, and a step ahead."""
        config = GRPOStage(steps=4, prompts_per_step=8, group_size=8, lr=3e-3)
        straight = self._run("grpo", config, "straight", rollouts=HERE).start()
        resumed = self._run("grpo", config, "resumed", rollouts=HERE)
        resumed.interrupted_at(2)
        resumed.start().assert_equals(straight)
        with self._idle_engine():  # checkpoints are read while a group of vLLM's exists
            beside = self._run("grpo", config, "beside", rollouts=HERE)
            beside.interrupted_at(2)
            beside.start().assert_equals(straight)
        ahead = config.model_copy(update={"overlap": True})
        lagging = self._run("grpo", ahead, "ahead", rollouts=HERE).start()
        # what is drawn beside training, from weights that are no more, is the same each time
        self._run("grpo", ahead, "ahead-again", rollouts=HERE).start().assert_equals(lagging)
        metrics = straight.metrics()
        return {
            "gaps": [row["sampler_gap"] for row in metrics],
            "rewards": [row["reward"] for row in metrics],
            "written": sorted(
                path.name for path in straight.job.checkpoint_dir.glob("vllm-rollouts/**/*")
            ),
            "lags": [row["policy_lag"] for row in lagging.metrics()],
            "moved": self._moved(straight),
        }

    def _moved(self, run: Run) -> float:
        ours = load_file(self.student / "model.safetensors")
        theirs = load_file(run.model_dir / "model.safetensors")
        return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs)

    def trainer(self) -> dict[str, Any]:
        """A stage that has nothing to do with an engine of its process, to the bit."""
        config = GRPOStage(steps=3, prompts_per_step=4, group_size=4, lr=3e-3)
        alone = self._run("grpo", config, "alone", rollouts=InProcess()).start()
        with self._idle_engine():
            accompanied = self._run("grpo", config, "accompanied", rollouts=InProcess()).start()
        accompanied.assert_equals(alone)
        return {"equal": True}

    def opd(self) -> dict[str, Any]:
        """A teacher scored in process, and student and teacher both: two engines."""
        config = OPDStage(steps=2, prompts_per_step=4, group_size=2, lr=3e-3, targets=TopK(k=8))
        served = self._run("opd", config, "scored", scoring=HERE).start()
        local = self._run("opd", config, "unserved", scoring=InProcess()).start()
        longer = OPDStage(steps=8, prompts_per_step=8, group_size=4, lr=3e-3, targets=TopK(k=16))
        both = self._run("opd", longer, "both", rollouts=HERE, scoring=HERE).start()
        names = ("loss", "grad_norm")
        return {
            "served": [[row[name] for name in names] for row in served.metrics()],
            "local": [[row[name] for name in names] for row in local.metrics()],
            "spent": served.spent() == local.spent(),
            "both": [[row["loss"], row["sampler_gap"]] for row in both.metrics()],
        }

    def teacher_rollouts(self) -> dict[str, Any]:
        """One engine that samples and scores."""
        config = TeacherRolloutsStage(
            rollouts_per_prompt=2, targets=TopK(k=16), sampling=SAMPLING, prompts_per_batch=4
        )
        run = self._run("teacher_rollouts", config, "cached", rollouts=HERE, scoring=HERE).start()
        parts = sorted(run.job.output_dir.glob("targets-*.safetensors"))
        logprobs = torch.cat([load_file(part)["logprobs_TK"].float() for part in parts])
        return {
            "rows": len(run.rollouts()),
            "mass": [float(one) for one in (logprobs.exp().sum(-1).min(), logprobs.max())],
        }


def main() -> None:
    """Try everything, and keep what came of it."""
    folder, student, teacher, asked = map(Path, sys.argv[1:5])
    bodies = json.loads(asked.read_text(encoding="utf-8"))
    scenes = Scenes(folder, student, teacher, bodies)
    found = {
        scene.__name__: scene()
        for scene in (
            scenes.process,
            scenes.weights,
            scenes.memory,
            scenes.trainer,
            scenes.grpo,
            scenes.opd,
            scenes.teacher_rollouts,
        )
    }
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
