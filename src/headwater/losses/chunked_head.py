"""Output head and loss fused in chunks over tokens: logits exist one chunk at a time.

A chunk's logits are made by one matmul, the loss overwrites them with its gradient, and two more
matmuls carry that to hidden states and head, all in the forward pass: peak memory does not grow
with tokens x vocabulary. What is alive at once of the size [C, V]: the logits in float32, for a
bfloat16 head their bfloat16 form, and whatever the loss needs itself (`losses.divergences`: a
teacher's whole distribution takes one more).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from headwater.types import LossSums

#: A loss on the logits [C, V] of the tokens in a slice, and whether a gradient is wanted.
#:
#: The logits are float32 (float64 for a float64 head) and belong to the loss until it returns: it
#: may overwrite them, and must keep no view of them, for the next chunk is made in their place.
#: It returns the sums, detached, and the gradient of `loss_sum` in the logits [C, V] (the logits'
#: own memory or other) or None if none is wanted.
ChunkLoss = Callable[[torch.Tensor, slice, bool], tuple[LossSums, torch.Tensor | None]]

_CHUNK_ELEMENTS = 1 << 23
_FEWEST_TOKENS = 64  # fewer rows make a slow matrix product
#: Rows of the head whose gradient is added at a time where it has to be widened first.
_HEAD_ROWS = 2048


def chunk_tokens(vocab_size: int) -> int:
    """Tokens a chunk: about 32 MiB of float32 logits, at least 64 tokens."""
    return max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // vocab_size)


def chunked_head_loss(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    loss: ChunkLoss,
    *,
    temperature: float = 1.0,
    tokens_per_chunk: int | None = None,
) -> LossSums:
    """Sum of `loss` over all T tokens, differentiable once in hidden_TH and head_VH.

    `loss` sees logits / temperature. The denominator and metrics of the chunks are added up. No
    gradient is made where grad mode is off or neither tensor requires one.
    """
    if not torch.is_grad_enabled():
        hidden_TH, head_VH = hidden_TH.detach(), head_VH.detach()
    size = tokens_per_chunk or chunk_tokens(head_VH.shape[0])
    metrics: dict[str, tuple[float, float]] = {}
    denominators: list[float] = []

    def counted(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        sums, grad_CV = loss(logits_CV, part, wants_gradient)
        denominators.append(sums.denominator)
        for name, (total, count) in sums.metrics.items():
            old_total, old_count = metrics.get(name, (0.0, 0.0))
            metrics[name] = (old_total + total, old_count + count)
        return sums, grad_CV

    loss_sum = _ChunkedHead.apply(hidden_TH, head_VH, counted, temperature, size)
    return LossSums(loss_sum=loss_sum, denominator=sum(denominators), metrics=metrics)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        head_VH: torch.Tensor,
        loss: ChunkLoss,
        temperature: float,
        size: int,
    ) -> torch.Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        tokens = hidden_TH.shape[0]
        chunk = _Chunk(head_VH, temperature, min(size, tokens))
        total = hidden_TH.new_zeros((), dtype=chunk.dtype)
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_head = _HeadGradient(head_VH, math.ceil(tokens / size)) if needs_head else None
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            logits_CV = chunk.logits(hidden_TH[part])
            sums, grad_CV = loss(logits_CV, part, needs_hidden or needs_head)
            total = total + sums.loss_sum
            if grad_CV is None:
                continue
            grad_CV = chunk.in_head_format(grad_CV)
            if grad_hidden is not None:
                torch.mm(grad_CV, head_VH, out=grad_hidden[part])
            if grad_head is not None:
                grad_head.add(grad_CV, hidden_TH[part])
            del grad_CV  # perhaps a teacher's memory: free before the next chunk's is made
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.total_VH)
        ctx.head_dtype, ctx.temperature = head_VH.dtype, temperature
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        # Scaled where they lie: autograd refuses a second backward, which would scale them again.
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_output / ctx.temperature
        if bool(scale != 1.0):
            for grad in (grad_hidden, grad_head):
                if grad is not None:
                    grad.mul_(scale)
        if grad_head is not None:
            grad_head = grad_head.to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None


class _Chunk:
    """Memory for one chunk's logits, in the head's format and in the loss's, used by each."""

    def __init__(self, head_VH: torch.Tensor, temperature: float, tokens: int) -> None:
        self.dtype = torch.promote_types(head_VH.dtype, torch.float32)
        self._head_VH, self._temperature = head_VH, temperature
        self._narrow = head_VH.new_empty(tokens, head_VH.shape[0])
        same = self.dtype == head_VH.dtype
        self._wide = self._narrow if same else torch.empty_like(self._narrow, dtype=self.dtype)

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """hidden @ head / temperature, [C, V], in place of the chunk before."""
        rows = hidden_CH.shape[0]
        torch.mm(hidden_CH, self._head_VH.T, out=self._narrow[:rows])
        logits_CV = self._wide[:rows]
        if self._wide is not self._narrow:
            logits_CV.copy_(self._narrow[:rows])
        if self._temperature != 1.0:
            logits_CV.div_(self._temperature)
        return logits_CV

    def in_head_format(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """The gradient in the format of the head's matmuls, [C, V]."""
        if grad_CV.dtype == self._narrow.dtype:
            return grad_CV
        return self._narrow[: grad_CV.shape[0]].copy_(grad_CV)


class _HeadGradient:
    """Gradient of the head [V, H], summed over chunks in float32 or better.

    A single chunk has nothing to sum and is left in the head's own format.
    """

    def __init__(self, head_VH: torch.Tensor, chunks: int) -> None:
        wide = torch.promote_types(head_VH.dtype, torch.float32)
        make = torch.zeros_like if chunks == 0 else torch.empty_like
        self.total_VH = make(head_VH, dtype=head_VH.dtype if chunks == 1 else wide)
        self._kept = 0.0  # what the first chunk leaves of the memory's content, then 1

    def add(self, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """Add one chunk's grad_CV.T @ hidden_CH."""
        if self.total_VH.dtype == grad_CV.dtype:
            self.total_VH.addmm_(grad_CV.T, hidden_CH, beta=self._kept)
        else:
            for row in range(0, self.total_VH.shape[0], _HEAD_ROWS):
                rows = slice(row, row + _HEAD_ROWS)
                part = grad_CV[:, rows].T @ hidden_CH
                total = self.total_VH[rows]
                total.add_(part) if self._kept else total.copy_(part)
        self._kept = 1.0
