"""Where the tokens of groups that share their prompt lie in one flat row.

Tokens of many groups lie flat, without padding, in one row: all prompts, then all completions.
Every linear layer of the model works on just these. Only attention needs to know which token
sees which: a completion sees its group's prompt, computed once, and its own earlier tokens.

M kv heads, D head dimension, L length of a padded block; others as in `headwater.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class PromptCache:
    """Keys and values of P prompts for every layer, right-padded: [P, M, L, D] each."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of tokens that lie flat one after another, as a padded block and back.

    index [rows * length] and valid [rows, length] lead into the block, inverse [tokens] out of
    it; all None where every row is `length` long and the block is a view.
    """

    rows: int
    length: int
    index: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Block:
        """The block of rows with these lengths."""
        longest = max(lengths, default=0)
        if all(length == longest for length in lengths):
            return cls(len(lengths), longest)
        lengths_B = torch.tensor(lengths)
        columns = torch.arange(longest)
        valid = columns[None, :] < lengths_B[:, None]
        starts = torch.cumsum(lengths_B, 0) - lengths_B
        index = torch.where(valid, starts[:, None] + columns, torch.zeros(1, dtype=torch.long))
        inverse = valid.reshape(-1).nonzero()[:, 0]
        return cls(
            len(lengths),
            longest,
            index.reshape(-1).to(device),
            valid.to(device),
            inverse.to(device),
        )

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] to [rows, length, ...]; what stands in the padding has no meaning."""
        padded = flat if self.index is None else flat.index_select(0, self.index)
        return padded.reshape(self.rows, self.length, *flat.shape[1:])

    def pad_zeros(self, flat: torch.Tensor) -> torch.Tensor:
        """As `pad`, with zeros in the padding."""
        padded = self.pad(flat)
        if self.valid is None:
            return padded
        return padded * self.valid.view(*self.valid.shape, *[1] * (flat.ndim - 1))

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[rows, length, ...] to [tokens, ...]."""
        flat = padded.reshape(self.rows * self.length, *padded.shape[2:])
        return flat if self.inverse is None else flat.index_select(0, self.inverse)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the prompts and completions of P groups lie in the flat row.

    prompts: P rows. completions: P * width rows, group by group, or None. prefix_bias
    [P, 1, L]: 0 or the lowest value, for prompts of unequal lengths. capture: filled with every
    layer's prompt keys and values by a forward pass.
    """

    prompts: Block
    prompt_tokens: int
    completions: Block | None
    width: int
    prefix_bias: torch.Tensor | None
    capture: PromptCache | None = None


def packed_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    capture: PromptCache | None = None,
) -> PackedLayout:
    """Layout of P groups lying flat as all prompts, then all completions in the same order.

    completion_lengths: one list per group, all of one length G (0 for prefill); a length may
    be 0. Raises ValueError when groups differ in G.
    """
    width = len(completion_lengths[0])
    if any(len(lengths) != width for lengths in completion_lengths):
        raise ValueError("groups of one batch must have the same number of completions")
    own = [length for lengths in completion_lengths for length in lengths]
    prompts = Block.of(prompt_lengths, device)
    return PackedLayout(
        prompts=prompts,
        prompt_tokens=sum(prompt_lengths),
        completions=Block.of(own, device) if any(own) else None,
        width=width,
        prefix_bias=None if prompts.valid is None else mask_bias(prompts.valid, dtype)[:, None],
        capture=capture,
    )


def mask_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask: 0 where visible, the dtype's lowest value elsewhere."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)
