"""Output head and loss fused in chunks over tokens: logits exist one chunk at a time.

A chunk's logits are made by one matmul, the loss overwrites them with its gradient, and two more
matmuls carry that to hidden states and head, all in the forward pass: peak memory does not grow
with tokens x vocabulary. What is alive at once of the size [C, V]: the logits in float32 and
whatever the loss needs itself (`losses.divergences`: a teacher's whole distribution takes one
more). A bfloat16 head's gradients are held, in bfloat16, for several chunks, up to 128 MiB: the
two products are faster with more rows, and the head's gradient is seldom widened and added up.
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
#: A bfloat16 head's gradients that are held: 128 MiB.
_HELD_ELEMENTS = 1 << 26
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
        wide = torch.promote_types(head_VH.dtype, torch.float32)
        total = hidden_TH.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        held = _Held(head_VH, temperature, tokens, size, needs_hidden or needs_head)
        grad_head = _HeadGradient(head_VH, math.ceil(tokens / held.tokens)) if needs_head else None
        for first in range(0, tokens, held.tokens):
            last = min(first + held.tokens, tokens)
            for start in range(first, last, size):
                part = slice(start, min(start + size, last))
                place = slice(part.start - first, part.stop - first)
                sums, grad_CV = loss(held.logits(hidden_TH[part], place), part, held.gradients)
                total = total + sums.loss_sum
                if grad_CV is not None:
                    held.keep(grad_CV, place)
                del grad_CV
            if not held.gradients:
                continue
            grad_DV = held.kept(last - first)
            if grad_hidden is not None:
                torch.mm(grad_DV, head_VH, out=grad_hidden[first:last])
            if grad_head is not None:
                grad_head.add(grad_DV, hidden_TH[first:last])
            del grad_DV  # perhaps a teacher's memory: free before the next chunk's is made
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


class _Held:
    """Memory for one chunk's logits in the loss's format, and for gradients in the head's.

    Where these are one format, the loss's gradient is taken as it is, chunk by chunk; otherwise
    the gradients of several chunks, `tokens` rows, wait in the places their logits were made in.
    """

    def __init__(
        self, head_VH: torch.Tensor, temperature: float, tokens: int, size: int, gradients: bool
    ) -> None:
        vocab, wide = head_VH.shape[0], torch.promote_types(head_VH.dtype, torch.float32)
        self.gradients = gradients
        self._head_VH, self._temperature = head_VH, temperature
        self._same = wide == head_VH.dtype
        chunks = 1 if self._same or not gradients else max(1, _HELD_ELEMENTS // (size * vocab))
        self.tokens = chunks * size
        self._narrow = head_VH.new_empty(min(self.tokens, tokens), vocab)
        self._wide = (
            self._narrow if self._same else head_VH.new_empty(min(size, tokens), vocab, dtype=wide)
        )
        self._taken = self._narrow

    def logits(self, hidden_CH: torch.Tensor, place: slice) -> torch.Tensor:
        """hidden @ head / temperature, [C, V], in the memory of the chunk before."""
        narrow = self._narrow[place]
        torch.mm(hidden_CH, self._head_VH.T, out=narrow)
        logits_CV = self._wide[: hidden_CH.shape[0]]
        if not self._same:
            logits_CV.copy_(narrow)
        if self._temperature != 1.0:
            logits_CV.div_(self._temperature)
        return logits_CV

    def keep(self, grad_CV: torch.Tensor, place: slice) -> None:
        """Take over one chunk's gradient in the logits."""
        if self._same:
            self._taken = grad_CV
        else:
            self._narrow[place].copy_(grad_CV)

    def kept(self, rows: int) -> torch.Tensor:
        """The gradients of the last `rows` tokens, [D, V], for the head's matmuls; kept no more."""
        taken, self._taken = self._taken, self._narrow
        return taken[:rows]


class _HeadGradient:
    """Gradient of the head [V, H], summed over its parts in float32 or better.

    A single part has nothing to sum and is left in the head's own format.
    """

    def __init__(self, head_VH: torch.Tensor, parts: int) -> None:
        wide = torch.promote_types(head_VH.dtype, torch.float32)
        make = torch.zeros_like if parts == 0 else torch.empty_like
        self.total_VH = make(head_VH, dtype=head_VH.dtype if parts == 1 else wide)
        self._kept = 0.0  # what the first part leaves of the memory's content, then 1

    def add(self, grad_DV: torch.Tensor, hidden_DH: torch.Tensor) -> None:
        """Add one part's grad_DV.T @ hidden_DH."""
        if self.total_VH.dtype == grad_DV.dtype:
            self.total_VH.addmm_(grad_DV.T, hidden_DH, beta=self._kept)
        else:
            for row in range(0, self.total_VH.shape[0], _HEAD_ROWS):
                rows = slice(row, row + _HEAD_ROWS)
                part = grad_DV[:, rows].T @ hidden_DH
                total = self.total_VH[rows]
                total.add_(part) if self._kept else total.copy_(part)
        self._kept = 1.0
