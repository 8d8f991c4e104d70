"""Turns rollouts into flat batches: the only place that pads, shifts and makes masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from headwater.engine.layout import PackedLayout, PromptCache, packed_layout
from headwater.world import World


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A prompt and completions that share it. `rows` are the caller's row numbers.

    teacher: the number of the one that is asked; groups of different ones share no micro-batch.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    teacher: int = 0

    @property
    def tokens(self) -> int:
        """Tokens the body computes for this group: a completion's last token is only predicted."""
        return len(self.prompt_ids) + sum(max(len(c) - 1, 0) for c in self.completions)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A flat micro-batch of whole groups.

    input_ids, position_ids: [1, tokens]. predict_index_T: flat position whose hidden state
    predicts target_ids_T[t]; row_T: the caller's row of each target; all int64.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    predict_index_T: torch.Tensor
    target_ids_T: torch.Tensor
    row_T: torch.Tensor
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens the body computes."""
        return int(self.input_ids.shape[1])


def micro_batches(
    groups: Sequence[PackedGroup], budget_tokens: int, *, divide: bool = False
) -> Iterator[tuple[PackedGroup, ...]]:
    """Groups sorted by length and cut into micro-batches of at most `budget_tokens`.

    Attention pads to the longest row of a micro-batch, so the cost counted is that of the
    padded block. A group larger than the budget is a micro-batch of its own, or with `divide`
    several, of one completion at least: each computes the prompt again, whose gradients add up.
    """
    if divide:
        groups = [part for group in groups for part in _divided(group, budget_tokens)]
    ordered = sorted(groups, key=_longest)
    batch: list[PackedGroup] = []
    for group in ordered:
        if batch and (
            len(group.completions) != len(batch[0].completions)
            or group.teacher != batch[0].teacher
            or padded_tokens([*batch, group]) > budget_tokens
        ):
            yield tuple(batch)
            batch = []
        batch.append(group)
    if batch:
        yield tuple(batch)


def dealt(groups: Sequence[PackedGroup], world: World) -> Sequence[PackedGroup]:
    """This rank's share of the groups: the longest first, each to the rank with the fewest tokens.

    Equal on every rank, whatever the order of ranks; some may get none.
    """
    if world.size == 1:
        return groups
    loads = [0] * world.size
    own = []
    for group in sorted(groups, key=lambda one: -one.tokens):
        rank = loads.index(min(loads))
        loads[rank] += group.tokens
        if rank == world.rank:
            own.append(group)
    return own


def _divided(group: PackedGroup, budget_tokens: int) -> Iterator[PackedGroup]:
    """The group in equal parts (the last may be smaller), as few as have the budget's size."""
    size, longest = len(group.completions), max(map(len, group.completions))
    while size > 1 and len(group.prompt_ids) + size * longest > budget_tokens:
        size = (size + 1) // 2
    for start in range(0, len(group.completions), size):
        end = start + size
        part = replace(group, completions=group.completions[start:end])
        yield replace(part, rows=group.rows[start:end])


def _longest(group: PackedGroup) -> tuple[int, int, int]:
    return (
        group.teacher,
        len(group.completions),
        max(len(group.prompt_ids), 0) + max(map(len, group.completions)),
    )


def padded_tokens(groups: Sequence[PackedGroup]) -> int:
    """Tokens of the padded block that attention makes of these groups."""
    prompt = max(len(g.prompt_ids) for g in groups)
    completion = max((len(c) for g in groups for c in g.completions), default=0)
    return len(groups) * (prompt + len(groups[0].completions) * completion)


def pack(
    groups: Sequence[PackedGroup], *, dtype: torch.dtype, device: torch.device | str
) -> TokenBatch:
    """Lay groups flat: every prompt once, then the completions, whose positions continue it.

    A completion's last token is a target but never an input, so it is not computed.
    """
    ids = [i for group in groups for i in group.prompt_ids]
    positions = [i for group in groups for i in range(len(group.prompt_ids))]
    predict: list[int] = []
    targets: list[int] = []
    row_of: list[int] = []
    prompt_end = 0
    for group in groups:
        prompt_end += len(group.prompt_ids)
        for row, completion in zip(group.rows, group.completions, strict=True):
            inputs = completion[:-1]
            start = len(ids)
            ids += inputs
            positions += range(len(group.prompt_ids), len(group.prompt_ids) + len(inputs))
            if completion:
                predict.append(prompt_end - 1)
                predict += range(start, start + len(inputs))
                targets += completion
                row_of += [row] * len(completion)
    layout = packed_layout(
        [len(g.prompt_ids) for g in groups],
        [[max(len(c) - 1, 0) for c in g.completions] for g in groups],
        dtype=dtype,
        device=device,
    )

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return TokenBatch(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        layout=layout,
        predict_index_T=tensor(predict),
        target_ids_T=tensor(targets),
        row_T=tensor(row_of),
        rows=tuple(row for group in groups for row in group.rows),
    )


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, PackedLayout, torch.Tensor]:
    """Prompts only, capturing their keys and values.

    Returns input_ids [1, tokens], position_ids [1, tokens], the layout with an empty capture to
    be filled by the forward, and the flat index [P] of each prompt's last token.
    """
    lengths = [len(p) for p in prompts]
    layout = packed_layout(
        lengths, [[] for _ in prompts], dtype=dtype, device=device, capture=PromptCache()
    )
    ids = torch.tensor([i for p in prompts for i in p], dtype=torch.long, device=device)
    positions = torch.tensor(
        [i for n in lengths for i in range(n)], dtype=torch.long, device=device
    )
    last = torch.cumsum(torch.tensor(lengths, device=device), 0) - 1
    return ids[None], positions[None], layout, last
