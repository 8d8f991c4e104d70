"""The loop every training stage shares: model, update, resume, metrics, rollouts, publishing."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from headwater.config.stages import TrainingStage
from headwater.engine.checkpoint import (
    Checkpoint,
    FoundCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from headwater.engine.memory import (
    OutOfMemory,
    keep_freed_memory,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
)
from headwater.engine.packing import PackedGroup, dealt
from headwater.engine.token_budget import TokenBudget
from headwater.engine.update import StepResult, Updater
from headwater.errors import BudgetExhausted, StageError
from headwater.stages.alerts import Alert, write_alerts
from headwater.stages.guards import Watcher
from headwater.stages.job import METRICS, MetricsLog, StageContext, StageJob, metrics_hash
from headwater.stages.kept_rollouts import KeptRollouts, are_vouched
from headwater.stages.ranks import of_main
from headwater.stages.trainee import Trainee
from headwater.types import LossSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Training is charged to the ledger at most this often, unless a budget or a label asks for more.
_CHARGE_SECONDS = 1.0
#: Saving takes at most about this share of the time, however large the model.
_SAVING_SHARE = 0.05
#: The guard that speaks when memory ran out.
_MEMORY = "out_of_memory"


class Learner(Trainee):
    """A model being trained by one stage, resumable at every step.

    Use as a context manager; iterate `steps()`, call `record` once a step, then `publish`.
    budget: of its micro-batches. `cursor` is the stage's own place in its data; it is saved with
    the weights, and so are files in `kept`, which `before_saving` may add to: it is called by all
    ranks.

    Budgets stop a stage before a step changes any weight: updates are reserved before the step,
    sampling and labels are charged before the update that learns from them. What the unfinished
    step did besides is undone when the stage resumes.
    """

    def __init__(self, job: StageJob, context: StageContext, *, total_steps: int, updates: int):
        assert isinstance(job.config, TrainingStage)
        keep_freed_memory()
        reset_peak_memory()
        super().__init__(job, context.world)
        self.job, self.context, self.config = job, context, job.config
        self.total_steps = total_steps
        self.updater = Updater(
            self.model, self.config, updates, self.dtype, self.world, self.adapters
        )
        self.cursor = 0
        self.alerts: list[Alert] = []
        self.budget = TokenBudget(self.config.micro_batch_tokens)
        self._watcher = Watcher(job.guards, total_steps)
        self._updates_per_step = updates // max(total_steps, 1)
        self._reserves_updates = math.isfinite(context.account.remaining("updates"))
        self._settles_each_step = self._reserves_updates
        self._done = 0
        self._spent_seconds = 0.0
        self.kept = KeptRollouts(job.checkpoint_dir)
        self.before_saving: Callable[[], None] | None = None
        self._pending: dict[str, float] = {}
        self._save_seconds = 0.0
        self._resume()
        self._started = self._saved_at = self._charged_at = time.perf_counter()
        self._metrics: MetricsLog | None = None  # the main rank's
        for row in self.world.from_main(self._open_metrics):
            self.alerts += self._watcher.watch(int(row["step"]), row)
        self._last = self._started
        self._settle()

    def _open_metrics(self) -> list[dict[str, Any]]:
        """Open the metrics; returns the rows of steps that are done."""
        path = self.job.checkpoint_dir / METRICS
        self._metrics = MetricsLog(path, self._done, self._spent_seconds)
        return self._metrics.kept

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
            if stop or refused or self.world.from_main(self._save_is_due):
                self.save()
            self._refuse_alerts()
            if stop:
                self.context.raise_if_stopped()

    @property
    def next_step(self) -> int:
        """The step that `steps` gives next."""
        return self._done

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

        Ranks call it together with the same groups, and each takes its share. loss_of: the loss of
        a micro-batch; it may be asked again for other micro-batches of the same groups.
        denominator: the global count to divide by. Where memory runs out the step is done again in
        micro-batches of half the size, whose gradient is the same but for rounding; but not where
        several ranks wait for each other. Raises StageError on a loss or gradient that is not
        finite, and where a single response does not fit.
        """
        own = dealt(groups, self.world)
        while True:
            micros = self.budget.micro_batches(own)
            losses: list[Callable[[], LossSums]] = [partial(loss_of, micro) for micro in micros]
            most = max(self.world.gather(len(micros)))
            losses += [self.idle] * (most - len(micros))
            try:
                return self.updater.step(losses, denominator)
            except OutOfMemory as error:
                said = str(error)
            except StageError as error:
                raise StageError(f"{self._here()}: {error}") from error
            if self.world.size > 1:
                raise StageError(
                    f"{self._here()}: memory ran out on rank {self.world.rank} ({said}), and "
                    "micro-batches are not halved while other ranks wait; lower "
                    "micro_batch_tokens, set compute.activation_checkpointing, or raise "
                    "compute.ranks"
                )
            release_memory()
            self._halve_micro_batches(groups, said)

    def _halve_micro_batches(self, groups: Sequence[PackedGroup], said: str) -> None:
        before = self.budget.tokens
        if not self.budget.halve(groups):
            raise StageError(
                f"{self._here()}: a single response does not fit into memory ({said}), and no "
                "micro-batch can be smaller; lower sampling.max_new_tokens, use a smaller model or "
                "compute.precision=bfloat16, or lower compute.processes"
            )
        self._out_of_memory("micro_batch_tokens", self.budget.tokens, before, said)

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
        finite = self.world.from_main(partial(self._write_metrics, step, finite))
        for alert in self._watcher.watch(step, finite):
            self.alerts.append(alert)
            self.context.report_alert(alert)
        if self.world.is_main:
            self.kept.add(rollouts)
        self._done = step + 1
        if self._settles_each_step or self.world.from_main(self._charge_is_due):
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

    def _write_metrics(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Write a row; returns it, for all ranks to have the times of one clock."""
        assert self._metrics is not None
        self._metrics.write(step, values)
        return values

    def _charge_is_due(self) -> bool:
        return time.perf_counter() - self._charged_at > _CHARGE_SECONDS

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
        if self.before_saving is not None:
            self.before_saving()
        state = {
            **self.world.from_main(self._save_beside),
            "done": self._done,
            "updates": self.updater.steps_done,
            "cursor": cursor,
            "ledger_position": ledger_position,
            "seconds": self._spent_seconds + time.perf_counter() - self._started,
            "micro_batch_tokens": self.budget.tokens,
            "out_of_memory": [asdict(one) for one in self.alerts if one.guard == _MEMORY],
        }
        checkpoint = Checkpoint(self.updater.state(), state)
        save_checkpoint(folder / "steps", self._done, checkpoint, self.world)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - began

    def _save_beside(self) -> dict[str, Any]:
        """Write what lies beside the checkpoint; returns what vouches for it."""
        assert self._metrics is not None
        self.kept.save(self._done)
        self._metrics.flush()
        return {
            "files": self.kept.files,
            "metrics_sha256": metrics_hash(self._metrics.path, self._done),
        }

    def _resume(self) -> None:
        found = self.world.from_main(self._find_checkpoint)
        if found is not None:
            state = found.state
            self._done = int(state["done"])
            self.cursor = int(state["cursor"])
            self._spent_seconds = float(state["seconds"])
            self.budget.lower_to(int(state.get("micro_batch_tokens", self.budget.tokens)))
            self.alerts = [Alert(**plain) for plain in state.get("out_of_memory", ())]
            self.updater.restore(found.read, int(state["updates"]))
        self.context.account.rewind(0 if found is None else int(found.state["ledger_position"]))
        files = {} if found is None else found.state["files"]
        self.world.from_main(lambda: self.kept.resume(files, self._done))

    def _find_checkpoint(self) -> FoundCheckpoint | None:
        """The newest one that what lies beside it, and the ledger, bear out."""
        folder = self.job.checkpoint_dir
        found = load_checkpoint(folder / "steps")
        if found is None:
            return None
        state = found.state
        if (
            are_vouched(folder, state["files"])
            and state["metrics_sha256"] == metrics_hash(folder / METRICS, state["done"])
            and int(state["ledger_position"]) <= of_main(self.context).account.position()
        ):
            return found
        shutil.rmtree(folder / "steps")
        return None

    def publish(self) -> None:
        """Write the model folder, metrics and rollouts into the stage's output.

        Nothing else of the stage is needed afterwards: not its checkpoints, not this object.
        """
        self._settle()
        self.context.account.observe_peak_memory(peak_memory_bytes())
        model = self.updater.trained.finished(self.model, keep=self.world.is_main)
        self.world.from_main(lambda: self._write(model))

    def _write(self, model: PreTrainedModel | None) -> None:
        assert model is not None and self._metrics is not None
        out = self.job.output_dir
        self.write_model(model, self.job)
        self._metrics.close()
        shutil.copyfile(self._metrics.path, out / METRICS)
        write_alerts(sorted(self.alerts, key=lambda one: (one.step, one.guard)), out)
        self.kept.publish(out / "rollouts.parquet")

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
            if self._metrics is not None:
                self._metrics.close()
