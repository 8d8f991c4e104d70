"""Output head and loss fused in chunks over tokens: logits exist one chunk at a time.

The loss is computed on a chunk's float32 logits, its gradient with respect to hidden states and
head is made in the same pass, and the logits are dropped: peak memory does not grow with
tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headwater.types import LossSums

#: A loss on the float32 logits [C, V] of the tokens in a slice.
ChunkLoss = Callable[[torch.Tensor, slice], LossSums]

_CHUNK_ELEMENTS = 1 << 24
#: Rows of the head whose gradient is added at a time where it has to be widened first.
_HEAD_ROWS = 2048


def chunk_tokens(vocab_size: int) -> int:
    """Tokens a chunk: about 64 MiB of float32 logits, at least 16 tokens."""
    return max(16, _CHUNK_ELEMENTS // vocab_size)


def chunked_head_loss(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    loss: ChunkLoss,
    *,
    temperature: float = 1.0,
    tokens_per_chunk: int | None = None,
) -> LossSums:
    """Sum of `loss` over all T tokens, differentiable in hidden_TH and head_VH.

    `loss` sees logits / temperature. The denominator and metrics of the chunks are added up.
    """
    size = tokens_per_chunk or chunk_tokens(head_VH.shape[0])
    metrics: dict[str, tuple[float, float]] = {}
    denominators: list[float] = []

    def one_chunk(logits_CV: torch.Tensor, part: slice) -> torch.Tensor:
        sums = loss(logits_CV, part)
        denominators.append(sums.denominator)
        for name, (total, count) in sums.metrics.items():
            old_total, old_count = metrics.get(name, (0.0, 0.0))
            metrics[name] = (old_total + total, old_count + count)
        return sums.loss_sum

    loss_sum = _ChunkedHead.apply(hidden_TH, head_VH, one_chunk, temperature, size)
    return LossSums(loss_sum=loss_sum, denominator=sum(denominators), metrics=metrics)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        head_VH: torch.Tensor,
        one_chunk: Callable[[torch.Tensor, slice], torch.Tensor],
        temperature: float,
        size: int,
    ) -> torch.Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        accumulate = torch.promote_types(head_VH.dtype, torch.float32)
        grad_head = torch.zeros_like(head_VH, dtype=accumulate) if needs_head else None
        for start in range(0, hidden_TH.shape[0], size):
            part = slice(start, min(start + size, hidden_TH.shape[0]))
            hidden = hidden_TH[part]
            logits = (hidden @ head_VH.T).to(accumulate)
            if temperature != 1.0:
                logits = logits / temperature
            if not (needs_hidden or needs_head):
                total = total + one_chunk(logits, part)
                continue
            with torch.enable_grad():
                logits.requires_grad_(True)
                value = one_chunk(logits, part)
            total = total + value.detach()
            (grad_logits,) = torch.autograd.grad(value, logits)
            if temperature != 1.0:
                grad_logits = grad_logits / temperature
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, head_VH, out=grad_hidden[part])
            if grad_head is not None:
                if hidden.dtype == accumulate:
                    grad_head.addmm_(grad_logits.T, hidden)
                else:
                    for row in range(0, grad_head.shape[0], _HEAD_ROWS):
                        rows = slice(row, row + _HEAD_ROWS)
                        grad_head[rows] += grad_logits[:, rows].T @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_output).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None
