"""What an optimiser step changes: the float32 numbers behind a model, and how gradients reach them.

A model is trained in full (`WholeWeights`), or through adapters (`engine.adapters`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from headwater.engine.sharding import is_sharded, like_sharded, local_part, whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Masters(Protocol):
    """Float32 numbers that are trained, by name, and what computes with them.

    names, masters: of the same order. copies: what AdamW keeps equal to the masters (or they
    themselves). is_spread: whether each rank has other parts of them.
    """

    names: list[str]
    masters: list[torch.Tensor]
    copies: list[torch.Tensor]
    is_spread: bool

    def collect(self) -> None:
        """Add what a micro-batch left to the sum of those before it; another one follows."""

    def gradients(self) -> list[torch.Tensor | None]:
        """The step's gradients, of all micro-batches; None for what had no part in the loss."""

    def drop_gradients(self) -> None:
        """Forget all gradients."""

    def changed(self) -> None:
        """The masters, and their copies, have new values: compute with them."""

    def to_save(self, column: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Tensors like the masters, by name, each as a checkpoint holds it."""

    def finished(self, model: PreTrainedModel, *, keep: bool) -> PreTrainedModel | None:
        """The model with float32 weights, whole, on ranks that `keep` it; it is trained no more.

        All ranks call it.
        """


class WholeWeights:
    """Every parameter that wants a gradient.

    The model comes in float32. Its parameters (not its buffers: rotary tables stay float32) are
    cast to `compute_dtype`; in float32 they are the masters themselves, and of a sharded model,
    which casts what it gathers, this rank's parts of them are.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._params = [p for p in model.parameters() if p.requires_grad]
        self.is_spread = is_sharded(model)
        self._is_master = compute_dtype == torch.float32 or self.is_spread
        self.copies = [local_part(p.detach()) for p in self._params]
        self.masters = self.copies if self._is_master else [p.float() for p in self.copies]
        if not self._is_master:
            for param in self._params:
                param.data = param.data.to(compute_dtype)
            self.copies = [p.detach() for p in self._params]

    def collect(self) -> None:
        """Narrow gradients are added up in float32; wide ones by autograd, where they are."""
        if self._is_master:
            return
        for master, param in zip(self.masters, self._params, strict=True):
            if param.grad is None:
                continue
            grad = param.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            param.grad = None

    def gradients(self) -> list[torch.Tensor | None]:
        """Of a single micro-batch as they are, of several their sum."""
        if not self._is_master and any(master.grad is not None for master in self.masters):
            self.collect()
            return [master.grad for master in self.masters]
        return [None if p.grad is None else local_part(p.grad) for p in self._params]

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.masters, *self._params):
            tensor.grad = None

    def changed(self) -> None:
        """Nothing to do: the copies are what computes."""

    def to_save(self, column: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors themselves, sharded as the model is."""
        return {
            name: like_sharded(tensor.detach(), param)
            for name, tensor, param in zip(self.names, column, self._params, strict=True)
        }

    def finished(self, model: PreTrainedModel, *, keep: bool) -> PreTrainedModel | None:
        """The model itself, with its masters as weights; of a sharded one a copy."""
        if not self._is_master:
            for master, param in zip(self.masters, self._params, strict=True):
                param.data = master
        return whole_model(model, keep=keep)
