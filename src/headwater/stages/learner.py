"""The loop every training stage shares: model, update, resume, metrics, rollouts, publishing."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwater.config.stages import TrainingStage
from headwater.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from headwater.engine.forward import load_engine_model
from headwater.engine.memory import (
    OutOfMemory,
    keep_freed_memory,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
)
from headwater.engine.packing import PackedGroup
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.engine.token_budget import TokenBudget
from headwater.engine.update import StepResult, Updater
from headwater.errors import BudgetExhausted, StageError
from headwater.models.loading import load_tokenizer
from headwater.models.saving import save_model
from headwater.models.vocabulary import usable_vocabulary
from headwater.stages.alerts import Alert, write_alerts
from headwater.stages.guards import Watcher
from headwater.stages.job import METRICS, MetricsLog, StageContext, StageJob, metrics_hash
from headwater.stages.rollouts import ROLLOUT_SCHEMA
from headwater.storage import flush, sha256_of
from headwater.types import LossSums

#: Training is charged to the ledger at most this often, unless a budget or a label asks for more.
_CHARGE_SECONDS = 1.0
#: Saving takes at most about this share of the time, however large the model.
_SAVING_SHARE = 0.05
#: The guard that speaks when memory ran out.
_MEMORY = "out_of_memory"
#: Rollouts that are in memory together when a stage publishes.
_ROWS_AT_ONCE = 4096


class Learner:
    """A model being trained by one stage, resumable at every step.

    Use as a context manager; iterate `steps()`, call `record` once a step, then `publish`.
    `cursor` is the stage's own place in its data; it is saved with the weights.

    Budgets stop a stage before a step changes any weight: updates are reserved before the step,
    sampling and labels are charged before the update that learns from them. What the unfinished
    step did besides is undone when the stage resumes.
    """

    def __init__(self, job: StageJob, context: StageContext, *, total_steps: int, updates: int):
        assert isinstance(job.config, TrainingStage) and job.model_dir is not None
        keep_freed_memory()
        reset_peak_memory()
        self.job, self.context, self.config = job, context, job.config
        self.total_steps = total_steps
        self.device = resolve_device(job.compute)
        self.tokenizer = load_tokenizer(job.model_dir)
        self.model = load_engine_model(job.model_dir, torch.float32, self.device)
        self.dtype = resolve_dtype(job.compute, self.device, int(self.model.config.hidden_size))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.vocab_size = usable_vocabulary(self.tokenizer)
        self.updater = Updater(self.model, self.config, updates, self.dtype)
        self.cursor = 0
        self.alerts: list[Alert] = []
        self._budget = TokenBudget(self.config.micro_batch_tokens)
        self._watcher = Watcher(job.guards, total_steps)
        self._updates_per_step = updates // max(total_steps, 1)
        self._reserves_updates = math.isfinite(context.account.remaining("updates"))
        self._settles_each_step = self._reserves_updates
        self._done = 0
        self._spent_seconds = 0.0
        self._rollouts: list[dict[str, Any]] = []
        self._files: dict[str, str] = {}  # parts of the rollouts on disk, by their hashes
        self._pending: dict[str, float] = {}
        self._save_seconds = 0.0
        self._resume()
        self._started = self._saved_at = self._charged_at = time.perf_counter()
        self._metrics = MetricsLog(job.checkpoint_dir / METRICS, self._done, self._spent_seconds)
        for row in self._metrics.kept:
            self.alerts += self._watcher.watch(int(row["step"]), row)
        self._last = self._started
        self._settle()

    # --- the loop -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Steps still to do. Between steps it checkpoints and obeys a request to stop.

        Raises BudgetExhausted before a step whose updates the budget does not allow, and, where
        the run is strict, StageError once an alert is saved.
        """
        self._refuse_alerts()
        while self._done < self.total_steps:
            self._reserve_updates()
            yield self._done
            stop = self.context.stop_requested()
            refused = self.context.strict and bool(self.alerts)
            if stop or refused or self._save_is_due():
                self.save()
            self._refuse_alerts()
            if stop:
                self.context.raise_if_stopped()

    def _refuse_alerts(self) -> None:
        if self.context.strict and self.alerts:
            raise StageError(
                f"{self.job.kind} (stage {self.job.fingerprint}): {self.alerts[0].words}. --strict "
                "ends the run here, with everything saved: run again without --strict to go on"
            )

    def _save_is_due(self) -> bool:
        interval = max(self.config.checkpoint_seconds, self._save_seconds / _SAVING_SHARE)
        return time.perf_counter() - self._saved_at > interval

    def _reserve_updates(self) -> None:
        """Charge the next step's updates, where they are limited: several stages may share it."""
        if not self._reserves_updates:
            return
        account, needed = self.context.account, self._updates_per_step
        left = account.remaining("updates")
        if left < needed:
            raise BudgetExhausted(
                f"{left:g} updates are left of the budget and the next step of {self.job.kind} "
                f"takes {needed}; raise budget.updates and run again to continue"
            )
        account.charge(updates=needed)

    def charge(self, **amounts: float) -> None:
        """Count work that no budget limits; written to the ledger within about a second."""
        for name, amount in amounts.items():
            self._pending[name] = self._pending.get(name, 0.0) + amount

    def charge_training(self, tokens: int) -> None:
        """Count one update on `tokens` tokens, at 6 FLOPs a parameter and token."""
        self.charge(trained_tokens=tokens, flops=6.0 * self.parameters * tokens)
        if not self._reserves_updates:
            self.charge(updates=1)

    def charge_sampling(self, prompts: int, tokens: int) -> None:
        """Charge responses at once. Raises BudgetExhausted; call it before learning from them."""
        self.will_charge_at_once()
        flops = 2.0 * self.parameters * tokens
        self.context.account.charge(prompts=prompts, generated_tokens=tokens, flops=flops)

    def will_charge_at_once(self) -> None:
        """Call before anything is charged past `charge`: earlier steps are then settled first."""
        self._settles_each_step = True

    def update(
        self,
        groups: Sequence[PackedGroup],
        denominator: float,
        loss_of: Callable[[Sequence[PackedGroup]], LossSums],
    ) -> StepResult:
        """One optimiser step on these groups, in micro-batches that fit into memory.

        loss_of: the loss of a micro-batch; it may be asked again for other micro-batches of the
        same groups. denominator: the global count to divide by. Where memory runs out the step is
        done again in micro-batches of half the size, whose gradient is the same but for rounding.
        Raises StageError on a loss or gradient that is not finite, and where a single response
        does not fit.
        """
        while True:
            micros = self._budget.micro_batches(groups)
            try:
                return self.updater.step((partial(loss_of, micro) for micro in micros), denominator)
            except OutOfMemory as error:
                said = str(error)
            except StageError as error:
                raise StageError(f"{self._here()}: {error}") from error
            release_memory()
            self._halve_micro_batches(groups, said)

    def _halve_micro_batches(self, groups: Sequence[PackedGroup], said: str) -> None:
        before = self._budget.tokens
        if not self._budget.halve(groups):
            raise StageError(
                f"{self._here()}: a single response does not fit into memory ({said}), and no "
                "micro-batch can be smaller; lower sampling.max_new_tokens, use a smaller model or "
                "compute.precision=bfloat16, or lower compute.processes"
            )
        self._out_of_memory("micro_batch_tokens", self._budget.tokens, before, said)

    def halved_rows(self, rows: int, before: int, said: str) -> None:
        """The sampler ran out of memory and goes on with fewer rows at once."""
        self._out_of_memory("sampling rows", rows, before, said)

    def _out_of_memory(self, limit: str, now: int, before: int, said: str) -> None:
        """Say once a limit that memory ran out; that limit's later halvings change the numbers."""
        told = [one for one in self.alerts if one.quantity == limit]
        step, before = (told[0].step, int(told[0].threshold)) if told else (self._done + 1, before)
        alert = Alert(
            guard=_MEMORY,
            quantity=limit,
            step=step,
            value=float(now),
            threshold=float(before),
            seen=f"step {step} of {self.total_steps}: memory ran out ({said}); {limit} lowered "
            f"from {before} to {now} for the rest of the stage, results are the same but for "
            "rounding",
            causes="micro-batches too large for this machine, or other processes that use it",
            cures="a lower micro_batch_tokens, fewer compute.processes, or shorter responses",
        )
        self.alerts = [one for one in self.alerts if one not in told] + [alert]
        if not told:
            self.context.report_alert(alert)

    def _here(self) -> str:
        step = f"step {self._done + 1} of {self.total_steps}"
        return f"{self.job.kind} (stage {self.job.fingerprint}), {step}"

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
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._metrics.write(step, finite)
        for alert in self._watcher.watch(step, finite):
            self.alerts.append(alert)
            self.context.report_alert(alert)
        self._rollouts += [dict(row) for row in rollouts]
        self._done = step + 1
        if self._settles_each_step or now - self._charged_at > _CHARGE_SECONDS:
            self._settle()
        self.context.report_progress(
            {
                "stage": self.job.fingerprint,
                "kind": self.job.kind,
                "step": self._done,
                "total": self.total_steps,
                **finite,
            }
        )

    def _settle(self) -> None:
        """Write what was counted; a stage that fails in its next step returns to here."""
        pending, self._pending = self._pending, {}
        self._charged_at = time.perf_counter()
        if pending:
            self.context.account.charge(**pending)
        self._settled = (self.context.account.position(), self.cursor)

    # --- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Checkpoint weights, optimiser, cursor, ledger position and rollouts together."""
        self._settle()
        self._save()

    def _save(self) -> None:
        began = time.perf_counter()
        ledger_position, cursor = self._settled
        folder = self.job.checkpoint_dir
        if self._rollouts:
            part = folder / "rollouts" / f"part-{self._done:09d}.parquet"
            _write_rows(self._rollouts, part)
            self._files[part.relative_to(folder).as_posix()] = sha256_of(part)
            self._rollouts = []
        self._metrics.flush()
        state = {
            "files": self._files,
            "metrics_sha256": metrics_hash(self._metrics.path, self._done),
            "done": self._done,
            "updates": self.updater.steps_done,
            "cursor": cursor,
            "ledger_position": ledger_position,
            "seconds": self._spent_seconds + time.perf_counter() - self._started,
            "micro_batch_tokens": self._budget.tokens,
            "out_of_memory": [asdict(one) for one in self.alerts if one.guard == _MEMORY],
        }
        save_checkpoint(folder / "steps", self._done, Checkpoint(self.updater.state(), state))
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - began

    def _resume(self) -> None:
        folder = self.job.checkpoint_dir
        found = load_checkpoint(folder / "steps")
        if found is not None and not self._is_vouched(found.state):
            shutil.rmtree(folder / "steps")
            found = None
        position = 0
        if found is not None:
            self._done = int(found.state["done"])
            self.cursor = int(found.state["cursor"])
            self._spent_seconds = float(found.state["seconds"])
            self._budget.lower_to(int(found.state.get("micro_batch_tokens", self._budget.tokens)))
            self.alerts = [Alert(**plain) for plain in found.state.get("out_of_memory", ())]
            position = int(found.state["ledger_position"])
            self._files = dict(found.state.get("files", {}))
            self.updater.load_state(found.tensors, int(found.state["updates"]))
        self.context.account.rewind(position)
        if found is None:
            shutil.rmtree(folder / "rollouts", ignore_errors=True)
        for part in (folder / "rollouts").glob("part-*.parquet"):
            if int(part.stem.removeprefix("part-")) > self._done:
                part.unlink()

    def _is_vouched(self, state: Mapping[str, Any]) -> bool:
        """Whether what lies beside a checkpoint is what it was saved with, and so is the ledger."""
        folder = self.job.checkpoint_dir
        files = state.get("files", {})
        return (
            all(path.is_file() for path in map(folder.joinpath, files))
            and all(sha256_of(folder / name) == found for name, found in files.items())
            and state.get("metrics_sha256") in (None, metrics_hash(folder / METRICS, state["done"]))
            and int(state["ledger_position"]) <= self.context.account.position()
        )

    def publish(self) -> None:
        """Write the model folder, metrics and rollouts into the stage's output.

        Nothing else of the stage is needed afterwards: not its checkpoints, not this object.
        """
        self._settle()
        out = self.job.output_dir
        self.context.account.observe_peak_memory(peak_memory_bytes())
        with torch.no_grad():
            for master, param in zip(self.updater.masters, self.model.parameters(), strict=True):
                param.data = master.detach()
        save_model(self.model, self.tokenizer, out / "model")
        self._metrics.close()
        shutil.copyfile(self._metrics.path, out / METRICS)
        write_alerts(sorted(self.alerts, key=lambda one: (one.step, one.guard)), out)
        parts = sorted((self.job.checkpoint_dir / "rollouts").glob("part-*.parquet"))
        if parts or self._rollouts:
            _join_parts(parts, self._rollouts, out / "rollouts.parquet")

    def __enter__(self) -> Learner:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(exc, BudgetExhausted):
                self._pending = {}
                self._save()
        finally:
            self._metrics.close()


def _write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=ROLLOUT_SCHEMA), path)
    flush(path)
    flush(path.parent)


def _join_parts(parts: Sequence[Path], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows of the parts, then `rows`, as one file; holds some thousands at a time.

    Where the parts end, which is where a stage happened to save, shows in no byte of the file.
    """
    with pq.ParquetWriter(path, ROLLOUT_SCHEMA) as writer:
        waiting = ROLLOUT_SCHEMA.empty_table()
        for table in _tables_of(parts, rows):
            waiting = pa.concat_tables((waiting, table))
            while len(waiting) >= _ROWS_AT_ONCE:
                writer.write_table(waiting.slice(0, _ROWS_AT_ONCE).combine_chunks())
                waiting = waiting.slice(_ROWS_AT_ONCE)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


def _tables_of(parts: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> Iterator[pa.Table]:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = list(rows[start : start + _ROWS_AT_ONCE])
        yield pa.Table.from_pylist(chunk, schema=ROLLOUT_SCHEMA)
