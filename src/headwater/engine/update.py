"""The optimiser step: float32 masters, global denominators, clipping, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwater.config.stages import TrainingStage
from headwater.engine.memory import OutOfMemory, is_out_of_memory
from headwater.engine.optimizer import SlicedAdamW
from headwater.engine.sharding import is_sharded, like_sharded, local_part
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
    """AdamW on float32 master weights of a model that computes in `compute_dtype`.

    The model comes in float32. Its parameters (not its buffers: rotary tables stay float32) are
    cast to `compute_dtype`; in float32 they are the masters themselves, and of a sharded model,
    which casts what it gathers, this rank's parts of them are. Losses come as sums; the gradient is
    that of (sum over all micro-batches of all ranks) / (global denominator), however they are
    split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingStage,
        total_steps: int,
        compute_dtype: torch.dtype = torch.float32,
        world: World = SOLO,
    ) -> None:
        self._settings, self._world = settings, world
        self._total_steps = total_steps
        self.steps_done = 0
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._is_sharded = is_sharded(model)
        self._is_master = compute_dtype == torch.float32 or self._is_sharded
        self._computing = [local_part(p.detach()) for p in self._params]
        self.masters = self._computing if self._is_master else [p.float() for p in self._computing]
        if not self._is_master:
            for param in self._params:
                param.data = param.data.to(compute_dtype)
            self._computing = [p.detach() for p in self._params]
        self._optimizer = SlicedAdamW(
            self.masters,
            self._computing,
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
            self._drop_gradients()
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
                self._collect_gradients()
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

    def _collect_gradients(self) -> None:
        """Add what the last micro-batch left to the sum of those before it, in float32."""
        if self._is_master:
            return
        for master, param in zip(self.masters, self._params, strict=True):
            if param.grad is None:
                continue
            grad = param.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            param.grad = None

    def _gradients(self) -> list[torch.Tensor | None]:
        """The step's gradients: of a single micro-batch as they are, of several their sum."""
        if not self._is_master and any(master.grad is not None for master in self.masters):
            self._collect_gradients()
            return [master.grad for master in self.masters]
        return [None if p.grad is None else local_part(p.grad) for p in self._params]

    def _norm(self, gradients: Sequence[torch.Tensor | None]) -> float:
        """Norm of the whole gradient, all ranks' parts together."""
        norm = self._optimizer.norm(gradients)
        return math.hypot(*self._world.gather(norm)) if self._is_sharded else norm

    def _drop_gradients(self) -> None:
        for tensor in (*self.masters, *self._params):
            tensor.grad = None

    def _apply(self, loss: float, rate: float) -> float:
        gradients = self._gradients()
        norm = self._norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = self._not_finite(loss, norm, gradients)
            self._drop_gradients()
            raise StageError(
                f"update {self.steps_done}: {found}, expected "  # noqa: S608 - no SQL
                "finite numbers. Likely a learning rate that is too high (weights grew in the "
                "steps before), bfloat16 where float32 is needed, or a model that was broken "
                "when it came; lower lr or grad_clip, add warmup_steps, or set "
                "compute.precision=float32. Weights are unchanged"
            )
        self._optimizer.step(gradients, rate, min(1.0, self._settings.grad_clip / (norm + 1e-6)))
        self._drop_gradients()
        self.steps_done += 1
        return norm

    def _not_finite(
        self, loss: float, norm: float, gradients: Sequence[torch.Tensor | None]
    ) -> str:
        """What of loss and gradient is not finite, parameters by name."""
        found = f"loss={loss}, gradient norm={norm}"
        names = [
            name
            for name, gradient in zip(self._names, gradients, strict=True)
            if gradient is not None and not bool(gradient.isfinite().all())
        ]
        names = list(dict.fromkeys(name for found in self._world.gather(names) for name in found))
        if not names:
            return f"{found} (every parameter's gradient is finite)"
        shown = ", ".join(names[:_MOST_NAMES])
        shown += f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"{found} (not finite in {len(names)} of {len(self._names)} gradients: {shown})"

    def skip(self) -> None:
        """Count an update that had nothing to learn from, so that schedules stay matched."""
        self.steps_done += 1

    def widen(self) -> None:
        """Give the model its float32 masters as weights: it is trained no more."""
        if not self._is_master:
            for master, param in zip(self.masters, self._params, strict=True):
                param.data = master

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
            f"{key}/{name}": like_sharded(tensor.detach(), param)
            for key, column in columns.items()
            for name, tensor, param in zip(self._names, column, self._params, strict=True)
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


def _add(
    totals: dict[str, tuple[float, float]], metrics: Mapping[str, tuple[float, float]]
) -> None:
    """Add sums and counts of metrics to those so far."""
    for name, (total, count) in metrics.items():
        old_total, old_count = totals.get(name, (0.0, 0.0))
        totals[name] = (old_total + total, old_count + count)
