"""The optimiser step: float32 masters, global denominators, clipping, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwater.config.stages import TrainingStage
from headwater.engine.masters import Masters, WholeWeights
from headwater.engine.memory import OutOfMemory, is_out_of_memory
from headwater.engine.optimizer import SlicedAdamW
from headwater.errors import StageError
from headwater.types import LossSums
from headwater.world import SOLO, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Parameters named in an error.
_MOST_NAMES = 3


def learning_rate(settings: TrainingStage, step: int, total_steps: int) -> float:
    """Learning rate at optimiser step `step` (from 0): linear warmup, then the schedule.

    Cosine and linear end at a tenth of the peak.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    shape = (
        0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    )
    return settings.lr * (0.1 + 0.9 * shape)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did. Metrics are means over the global counts."""

    loss: float
    grad_norm: float
    metrics: Mapping[str, float]


class Updater:
    """AdamW on float32 masters of a model that computes in `compute_dtype`.

    trained: what of the model is trained, all its weights by default. Losses come as sums; the
    gradient is that of (sum over all micro-batches of all ranks) / (global denominator), however
    they are split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingStage,
        total_steps: int,
        compute_dtype: torch.dtype = torch.float32,
        world: World = SOLO,
        trained: Masters | None = None,
    ) -> None:
        self._settings, self._world = settings, world
        self._total_steps = total_steps
        self.steps_done = 0
        self.trained: Masters = trained or WholeWeights(model, compute_dtype)
        self.masters = self.trained.masters
        self._optimizer = SlicedAdamW(
            self.masters,
            self.trained.copies,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def step(
        self, micro_losses: Iterable[Callable[[], LossSums]], denominator: float
    ) -> StepResult:
        """Run every micro-batch forward and backward, then one AdamW step.

        denominator: the global count to divide by. Raises StageError on a loss or gradient that
        is not finite, and OutOfMemory where a micro-batch does not fit; weights and optimiser
        are then as they were, and no gradient is left.
        """
        try:
            loss, means = self._accumulate(micro_losses, denominator)
        except (RuntimeError, MemoryError) as error:
            self.trained.drop_gradients()
            if is_out_of_memory(error):
                raise OutOfMemory(str(error).partition("\n")[0] or type(error).__name__) from None
            raise
        rate = learning_rate(self._settings, self.steps_done, self._total_steps)
        norm = self._apply(loss, rate)
        return StepResult(loss=loss, grad_norm=norm, metrics=means | {"learning_rate": rate})

    def _accumulate(
        self, micro_losses: Iterable[Callable[[], LossSums]], denominator: float
    ) -> tuple[float, dict[str, float]]:
        """Gradients of all micro-batches added up; loss and mean metrics of all ranks."""
        totals: dict[str, tuple[float, float]] = {}
        loss = 0.0
        for index, compute in enumerate(micro_losses):
            if index:
                self.trained.collect()
            sums = compute()
            (sums.loss_sum / denominator).backward()
            loss += float(sums.loss_sum.detach()) / denominator
            _add(totals, sums.metrics)
        ranks = self._world.gather((loss, totals))
        loss, totals = 0.0, {}
        for part, metrics in ranks:
            loss += part
            _add(totals, metrics)
        return loss, {name: total / max(count, 1.0) for name, (total, count) in totals.items()}

    def _norm(self, gradients: Sequence[torch.Tensor | None]) -> float:
        """Norm of the whole gradient, all ranks' parts together."""
        norm = self._optimizer.norm(gradients)
        return math.hypot(*self._world.gather(norm)) if self.trained.is_spread else norm

    def _apply(self, loss: float, rate: float) -> float:
        gradients = self.trained.gradients()
        norm = self._norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = self._not_finite(loss, norm, gradients)
            self.trained.drop_gradients()
            raise StageError(
                f"update {self.steps_done}: {found}, expected "  # noqa: S608 - no SQL
                "finite numbers. Likely a learning rate that is too high (weights grew in the "
                "steps before), bfloat16 where float32 is needed, or a model that was broken "
                "when it came; lower lr or grad_clip, add warmup_steps, or set "
                "compute.precision=float32. Weights are unchanged"
            )
        self.steps_done += 1  # before any weight changes, for who reads them beside
        self._optimizer.step(gradients, rate, min(1.0, self._settings.grad_clip / (norm + 1e-6)))
        self.trained.changed()
        self.trained.drop_gradients()
        return norm

    def _not_finite(
        self, loss: float, norm: float, gradients: Sequence[torch.Tensor | None]
    ) -> str:
        """What of loss and gradient is not finite, parameters by name."""
        found = f"loss={loss}, gradient norm={norm}"
        names = [
            name
            for name, gradient in zip(self.trained.names, gradients, strict=True)
            if gradient is not None and not bool(gradient.isfinite().all())
        ]
        names = list(dict.fromkeys(name for found in self._world.gather(names) for name in found))
        every = len(self.trained.names)
        if not names:
            return f"{found} (every parameter's gradient is finite)"
        shown = ", ".join(names[:_MOST_NAMES])
        shown += f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"{found} (not finite in {len(names)} of {every} gradients: {shown})"

    def skip(self) -> None:
        """Count an update that had nothing to learn from, so that schedules stay matched."""
        self.steps_done += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and optimiser state by name, for a checkpoint: the tensors themselves, sharded
        as the model is."""
        optimizer = self._optimizer
        columns = {
            "master": self.masters,
            "exp_avg": optimizer.means,
            "exp_avg_sq": optimizer.squares,
        }
        tensors = {
            f"{key}/{name}": tensor
            for key, column in columns.items()
            for name, tensor in self.trained.to_save(column).items()
        }
        return tensors | {"updates": torch.tensor([optimizer.updates])}

    def restore(self, read: Callable[[Mapping[str, torch.Tensor]], None], steps_done: int) -> None:
        """Continue from a checkpoint, bit for bit; `read` fills the tensors of a `state()`."""
        self.steps_done = steps_done
        tensors = self.state()
        with torch.no_grad():
            read(tensors)
        self._optimizer.updates = int(tensors["updates"])
        self._optimizer.publish()
        self.trained.changed()


def _add(
    totals: dict[str, tuple[float, float]], metrics: Mapping[str, tuple[float, float]]
) -> None:
    """Add sums and counts of metrics to those so far."""
    for name, (total, count) in metrics.items():
        old_total, old_count = totals.get(name, (0.0, 0.0))
        totals[name] = (old_total + total, old_count + count)
