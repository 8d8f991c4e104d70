"""The optimiser step: float32 masters, global denominators, clipping, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwater.config.stages import TrainingStage
from headwater.errors import StageError
from headwater.types import LossSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    cast to `compute_dtype`; in float32 they are the masters themselves. Losses come as sums; the
    gradient is that of (sum over all micro-batches) / (global denominator), however they are split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: TrainingStage,
        total_steps: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._settings = settings
        self._total_steps = total_steps
        self.steps_done = 0
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._is_master = compute_dtype == torch.float32
        self.masters = (
            self._params
            if self._is_master
            else [p.detach().float().requires_grad_(True) for p in self._params]
        )
        for param in self._params:
            param.data = param.data.to(compute_dtype)
        self._optimizer = torch.optim.AdamW(
            self.masters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for master in self.masters:  # here, not in the first step: it keeps its memory for itself
            self._optimizer.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def step(
        self, micro_losses: Iterable[Callable[[], LossSums]], denominator: float
    ) -> StepResult:
        """Run every micro-batch forward and backward, then one AdamW step.

        denominator: the global count to divide by. Raises StageError on a loss or gradient that
        is not finite, before any weight changes.
        """
        totals: dict[str, tuple[float, float]] = {}
        loss = 0.0
        for compute in micro_losses:
            sums = compute()
            (sums.loss_sum / denominator).backward()
            self._collect_gradients()
            loss += float(sums.loss_sum.detach()) / denominator
            for name, (total, count) in sums.metrics.items():
                old_total, old_count = totals.get(name, (0.0, 0.0))
                totals[name] = (old_total + total, old_count + count)
        norm = self._apply(loss)
        means = {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
        return StepResult(loss=loss, grad_norm=norm, metrics=means)

    def _collect_gradients(self) -> None:
        if self._is_master:
            return
        for master, param in zip(self.masters, self._params, strict=True):
            if param.grad is None:
                continue
            grad = param.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            param.grad = None

    def _apply(self, loss: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self._settings.grad_clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise StageError(
                f"update {self.steps_done}: loss={loss} and gradient "  # noqa: S608 - no SQL
                f"norm={norm}, expected finite numbers; lower lr, or set "
                "compute.precision=float32. Weights are unchanged"
            )
        rate = learning_rate(self._settings, self.steps_done, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._publish_weights()
        return norm

    def skip(self) -> None:
        """Count an update that had nothing to learn from, so that schedules stay matched."""
        self.steps_done += 1

    def _publish_weights(self) -> None:
        if self._is_master:
            return
        with torch.no_grad():
            for master, param in zip(self.masters, self._params, strict=True):
                param.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and optimiser state by name, for a checkpoint."""
        tensors = {}
        for name, master in zip(self._names, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self._optimizer.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value.detach().reshape(-1) if key == "step" else value
        return {k: v.contiguous().cpu() for k, v in tensors.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Continue from `state()`, bit for bit."""
        self.steps_done = steps_done
        with torch.no_grad():
            for name, master in zip(self._names, self.masters, strict=True):
                master.copy_(tensors[f"master/{name}"])
                if f"exp_avg/{name}" in tensors:
                    state = {
                        key: tensors[f"{key}/{name}"].to(master.device, copy=True)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
                    state["step"] = state["step"].reshape(())
                    self._optimizer.state[master] = state
        self._publish_weights()
