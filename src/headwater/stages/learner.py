"""The loop every training stage shares: model, update, resume, metrics, rollouts, publishing."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwater.config.stages import TrainingStage
from headwater.engine.attention import ATTENTION_NAME
from headwater.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from headwater.engine.memory import peak_memory_bytes, reset_peak_memory
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.engine.update import Updater
from headwater.errors import BudgetExhausted
from headwater.models.loading import load_model, load_tokenizer
from headwater.models.saving import save_model
from headwater.stages.job import MetricsLog, StageContext, StageJob

#: Work that is charged at once, not with the next checkpoint, because budgets watch it.
_CHARGE_SECONDS = 1.0


class Learner:
    """A model being trained by one stage, resumable at every step.

    Use as a context manager; iterate `steps()`, call `record` once a step, then `publish`.
    `cursor` is the stage's own place in its data; it is saved with the weights.
    """

    def __init__(self, job: StageJob, context: StageContext, *, total_steps: int, updates: int):
        assert isinstance(job.config, TrainingStage) and job.model_dir is not None
        reset_peak_memory()
        self.job, self.context, self.config = job, context, job.config
        self.total_steps = total_steps
        self.device = resolve_device(job.compute)
        self.tokenizer = load_tokenizer(job.model_dir)
        self.model = load_model(
            job.model_dir,
            dtype=torch.float32,
            device=str(self.device),
            attn_implementation=ATTENTION_NAME,
        )
        self.dtype = resolve_dtype(job.compute, self.device, int(self.model.config.hidden_size))
        if self.dtype != torch.float32:
            self.model.to(self.dtype)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.vocab_size = len(self.tokenizer)
        self.updater = Updater(self.model, self.config, updates)
        self.cursor = 0
        self._done = 0
        self._spent_seconds = 0.0
        self._rollouts: list[dict[str, Any]] = []
        self._pending: dict[str, float] = {}
        self._resume()
        self._started = self._saved_at = self._charged_at = time.perf_counter()
        self._metrics = MetricsLog(
            job.checkpoint_dir / "metrics.jsonl", self._done, self._spent_seconds
        )
        self._last = self._started
        self._good_position = context.account.position()

    # --- the loop -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Steps still to do. Between steps it checkpoints and obeys a request to stop."""
        while self._done < self.total_steps:
            yield self._done
            stop = self.context.stop_requested()
            due = time.perf_counter() - self._saved_at > self.config.checkpoint_seconds
            if stop or due:
                self.save()
            if stop:
                self.context.raise_if_stopped()

    def charge(self, **amounts: float) -> None:
        """Count work; written to the ledger within a second, and before every checkpoint."""
        for name, amount in amounts.items():
            self._pending[name] = self._pending.get(name, 0.0) + amount

    def charge_training(self, tokens: int, updates: int = 1) -> None:
        """Count trained tokens at 6 FLOPs a parameter and token, and updates."""
        self.charge(trained_tokens=tokens, updates=updates, flops=6.0 * self.parameters * tokens)

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollouts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Close a step: metrics row, rollouts kept for reading, ledger, progress."""
        now = time.perf_counter()
        self.charge(seconds=now - self._last)
        self._last = now
        if now - self._charged_at > _CHARGE_SECONDS or "generated_tokens" in self._pending:
            self._flush_charges()
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._metrics.write(step, finite)
        self._rollouts += [dict(row) for row in rollouts]
        self._done = step + 1
        self._good_position = self.context.account.position()
        self.context.report_progress(
            {
                "stage": self.job.fingerprint,
                "kind": self.job.kind,
                "step": self._done,
                "total": self.total_steps,
                **finite,
            }
        )

    def _flush_charges(self) -> None:
        pending, self._pending = self._pending, {}
        self._charged_at = time.perf_counter()
        if pending:
            self.context.account.charge(**pending)

    # --- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Checkpoint weights, optimiser, cursor, ledger position and rollouts together."""
        self._flush_charges()
        self._save(self.context.account.position())

    def _save(self, ledger_position: int) -> None:
        folder = self.job.checkpoint_dir
        if self._rollouts:
            _write_rows(self._rollouts, folder / "rollouts" / f"part-{self._done:09d}.parquet")
            self._rollouts = []
        state = {
            "done": self._done,
            "updates": self.updater.steps_done,
            "cursor": self.cursor,
            "ledger_position": ledger_position,
            "seconds": self._spent_seconds + time.perf_counter() - self._started,
        }
        save_checkpoint(folder / "steps", self._done, Checkpoint(self.updater.state(), state))
        self._saved_at = time.perf_counter()

    def _resume(self) -> None:
        folder = self.job.checkpoint_dir
        found = load_checkpoint(folder / "steps")
        position = 0
        if found is not None:
            self._done = int(found.state["done"])
            self.cursor = int(found.state["cursor"])
            self._spent_seconds = float(found.state["seconds"])
            position = int(found.state["ledger_position"])
            self.updater.load_state(found.tensors, int(found.state["updates"]))
        self.context.account.rewind(position)
        for part in (folder / "rollouts").glob("part-*.parquet"):
            if int(part.stem.removeprefix("part-")) > self._done:
                part.unlink()

    def publish(self) -> None:
        """Write the model folder, metrics and rollouts into the stage's output."""
        self._flush_charges()
        out = self.job.output_dir
        self.context.account.observe_peak_memory(peak_memory_bytes())
        with torch.no_grad():
            for master, param in zip(self.updater.masters, self.model.parameters(), strict=True):
                param.data = master.detach()
        save_model(self.model, self.tokenizer, out / "model")
        self._metrics.close()
        shutil.copyfile(self._metrics.path, out / "metrics.jsonl")
        parts = sorted((self.job.checkpoint_dir / "rollouts").glob("part-*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        if rows or self._rollouts:
            _write_rows([*rows, *self._rollouts], out / "rollouts.parquet")

    def __enter__(self) -> Learner:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, BudgetExhausted):  # the unfinished step is undone when it resumes
            self._pending = {}
            self._save(self._good_position)


def _write_rows(rows: Sequence[Mapping[str, Any]], path: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=ROLLOUT_SCHEMA), path)


ROLLOUT_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("step", pa.int32()),
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("verdict", pa.string()),
        ("reward", pa.float32()),
        ("response_tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)
