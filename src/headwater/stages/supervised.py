"""Training on fixed responses: the batching that sft, sample_sft, warmup and pretrain share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from headwater import seeding
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, TokenBatch, pack
from headwater.losses.chunked_head import ChunkLoss, chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.stages.learner import Learner
from headwater.types import LossSums


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to learn, as token ids, and the number of whose response it is."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    teacher: int = 0


#: Makes the loss of a micro-batch whose `row_T` and `rows` are places in the example list.
LossOf = Callable[[TokenBatch], ChunkLoss]


def planned_steps(examples: int, batch_size: int, epochs: int, steps: int | None) -> int:
    """Updates of `epochs` passes (the last batch of a pass may be short), or `steps` if given."""
    return steps if steps is not None else epochs * math.ceil(examples / batch_size)


def batch_rows(examples: int, batch_size: int, step: int, names: tuple[int, str]) -> list[int]:
    """Places of the examples of one step, in a seeded order that is new every epoch."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, index = divmod(step, per_epoch)
    order = seeding.generator(*names, "order", epoch).permutation(examples)
    return [int(i) for i in order[index * batch_size : (index + 1) * batch_size]]


def cross_entropy_of(tokens: TokenBatch) -> ChunkLoss:
    """Hard-label cross-entropy, every token alike."""
    ones = torch.ones(tokens.target_ids_T.shape[0], device=tokens.target_ids_T.device)
    return cross_entropy(tokens.target_ids_T, ones)


def train_on(
    learner: Learner, examples: Sequence[Example], rows: Sequence[int], loss_of: LossOf
) -> dict[str, float]:
    """One update on the examples at `rows`: token mean over the batch. Returns its metrics."""
    started = time.perf_counter()
    groups = [
        PackedGroup(one.prompt_ids, (one.response_ids,), (row,), one.teacher)
        for row, one in ((row, examples[row]) for row in rows)
    ]
    denominator = float(sum(len(examples[row].response_ids) for row in rows))
    result = learner.update(groups, denominator, partial(_loss, learner, loss_of))
    tokens = sum(group.tokens for group in groups)
    learner.charge_training(tokens)
    seconds = time.perf_counter() - started
    return dict(result.metrics) | {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "trained_tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def _loss(learner: Learner, loss_of: LossOf, micro: Sequence[PackedGroup]) -> LossSums:
    tokens = pack(micro, dtype=learner.dtype, device=learner.device)
    hidden = hidden_at_targets(learner.model, tokens)
    head = head_weight(learner.model, learner.vocab_size)
    return chunked_head_loss(hidden, head, loss_of(tokens))
