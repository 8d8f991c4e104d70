"""Attention over groups of rollouts that share their prompt, as a transformers attention function.

Tokens of many groups lie flat, without padding, in one row of shape [1, tokens]; every linear
layer of the model works on just these. Only attention needs to know which token sees which, and
it reads that from a layout passed through the model's keyword arguments:

* `PackedLayout`: prompts once per group, completions beside them (training, scoring, prefill);
* `DecodeLayout`: one new token per row, prompt keys shared by a group, own keys in a cache.

Suffixes: B rows of a padded block, L its length, M kv heads, R query heads per kv head, D head
dimension; others as in `headwater.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from headwater.errors import InputError

ATTENTION_NAME = "headwater"
_BLOCK_TOKENS = 32


@dataclass(slots=True)
class PromptCache:
    """Keys and values of P prompts for every layer, right-padded: [P, M, L, D] each."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the prompt and completion tokens of P groups lie in the flat row.

    prompt_index_PL, completion_index_BL: flat positions, 0 where padded; *_bias: additive
    attention masks (0 or -inf) in the compute dtype, [P, 1, L, L] and [B, 1, 1, L];
    causal_LL for completions; group_of_B: the group each completion belongs to (B completions,
    the same number in every group). inverse: for each flat token its place in
    concat(prompt block, completion block).
    """

    prompt_index_PL: torch.Tensor
    prompt_bias: torch.Tensor  # [P, 1, L, L], causal and padding
    prefix_bias: torch.Tensor  # [P, 1, 1, L], padding only
    completion_index_BL: torch.Tensor | None
    completion_bias: torch.Tensor | None  # [1, 1, L, L], causal
    inverse: torch.Tensor
    capture: PromptCache | None = None


class DecodeLayout:
    """Rows that each extend by one token a step; KV written in place, grown by blocks.

    Every row belongs to one prompt; rows of a prompt share its keys and values. `keep` drops
    finished rows. Rows are ordered by prompt.
    """

    def __init__(
        self, prompts: PromptCache, prompt_lengths: Sequence[int], group_of_rows: torch.Tensor
    ) -> None:
        self._prompts = prompts
        first = prompts.keys[0]
        self._device, self._dtype = first.device, first.dtype
        length = first.shape[2]
        lengths = torch.tensor(prompt_lengths, device=self._device)
        visible = torch.arange(length, device=self._device)[None, :] < lengths[:, None]
        self._prefix_bias_PL = _bias(visible, self._dtype)
        self.group_of_rows = group_of_rows
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self.length = 0  # own tokens already in the cache
        self._capacity = 0
        self._own_bias = torch.empty(0)
        self._set_grid()

    @property
    def rows(self) -> int:
        """Rows still decoding."""
        return int(self.group_of_rows.shape[0])

    def begin_step(self) -> None:
        """Make room for one more token a row and mask the part of the cache not yet written."""
        if self.length == self._capacity:
            self._grow()
        visible = torch.arange(self._capacity, device=self._device) <= self.length
        self._own_bias = _bias(visible, self._dtype)

    def end_step(self) -> None:
        """The token written by the last forward becomes visible to later steps."""
        self.length += 1

    def keep(self, kept_rows: torch.Tensor) -> None:
        """Drop every row but `kept_rows` (int64 positions, ascending)."""
        self._keys = [k.index_select(0, kept_rows) for k in self._keys]
        self._values = [v.index_select(0, kept_rows) for v in self._values]
        self.group_of_rows = self.group_of_rows[kept_rows]
        self._set_grid()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """q [1, M*R, B, D], k and v [1, M, B, D] of the newest token; returns [B, M*R, D]."""
        _, heads, rows, dim = q.shape
        kv_heads = k.shape[1]
        if layer == len(self._keys):
            shape = (rows, kv_heads, self._capacity, dim)
            self._keys.append(k.new_zeros(shape))
            self._values.append(v.new_zeros(shape))
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.length] = k[0].transpose(0, 1)
        values[:, :, self.length] = v[0].transpose(0, 1)
        q_BMRD = (q[0].transpose(0, 1) * scaling).reshape(rows, kv_heads, heads // kv_heads, dim)

        prefix_keys, prefix_values = self._prompts.keys[layer], self._prompts.values[layer]
        length = prefix_keys.shape[2]
        q_grid = self._to_grid(q_BMRD)  # [P, M, W*R, D]
        prefix = torch.matmul(q_grid, prefix_keys.transpose(2, 3))
        prefix = prefix + self._prefix_bias_PL[:, None, None, :]
        own = torch.matmul(q_BMRD, keys.transpose(2, 3)) + self._own_bias
        scores = torch.cat((self._from_grid(prefix, rows, kv_heads), own), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        out = torch.matmul(weights[..., length:], values)
        from_prefix = torch.matmul(self._to_grid(weights[..., :length]), prefix_values)
        return (out + self._from_grid(from_prefix, rows, kv_heads)).reshape(rows, heads, dim)

    def _grow(self) -> None:
        self._capacity += _BLOCK_TOKENS

        def grown(old: torch.Tensor) -> torch.Tensor:
            rows, heads, length, dim = old.shape
            new = old.new_zeros((rows, heads, self._capacity, dim))
            new[:, :, :length] = old
            return new

        self._keys = [grown(k) for k in self._keys]
        self._values = [grown(v) for v in self._values]

    def _set_grid(self) -> None:
        """Rows as a [P, W] grid, W the most rows any prompt has; drops prompts without rows."""
        used, group = torch.unique_consecutive(self.group_of_rows, return_inverse=True)
        if used.shape[0] < self._prefix_bias_PL.shape[0]:
            self._prompts = PromptCache(
                [k.index_select(0, used) for k in self._prompts.keys],
                [v.index_select(0, used) for v in self._prompts.values],
            )
            self._prefix_bias_PL = self._prefix_bias_PL.index_select(0, used)
            self.group_of_rows = group
        counts = torch.bincount(group)
        self._width = int(counts.max())
        self._groups = int(used.shape[0])
        starts = torch.cumsum(counts, 0) - counts
        within = torch.arange(group.shape[0], device=self._device) - starts[group]
        self._cell_of_row = group * self._width + within
        self._rectangular = bool((counts == self._width).all())
        row_of_cell = torch.zeros(self._groups * self._width, dtype=torch.long, device=self._device)
        row_of_cell[self._cell_of_row] = torch.arange(group.shape[0], device=self._device)
        self._row_of_cell = row_of_cell

    def _to_grid(self, x_BMRX: torch.Tensor) -> torch.Tensor:
        if not self._rectangular:
            x_BMRX = x_BMRX.index_select(0, self._row_of_cell)
        _, kv_heads, repeats, last = x_BMRX.shape
        grid = x_BMRX.view(self._groups, self._width, kv_heads, repeats, last)
        return grid.transpose(1, 2).reshape(self._groups, kv_heads, self._width * repeats, last)

    def _from_grid(self, grid: torch.Tensor, rows: int, kv_heads: int) -> torch.Tensor:
        groups, _, cells, last = grid.shape
        repeats = cells // self._width
        flat = grid.view(groups, kv_heads, self._width, repeats, last).transpose(1, 2)
        flat = flat.reshape(groups * self._width, kv_heads, repeats, last)
        return flat if self._rectangular else flat.index_select(0, self._cell_of_row)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask: 0 where visible, the dtype's lowest value elsewhere."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)


def packed_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    capture: PromptCache | None = None,
) -> PackedLayout:
    """Layout of P groups lying flat as prompt, completion, completion, ..., prompt, ...

    completion_lengths: one list per group, all of one length G (0 for prefill); a length may
    be 0. Raises ValueError when groups differ in G.
    """
    groups, width = len(prompt_lengths), len(completion_lengths[0])
    if any(len(lengths) != width for lengths in completion_lengths):
        raise ValueError("groups of one batch must have the same number of completions")
    longest = max(prompt_lengths)
    prompt_index = torch.zeros(groups, longest, dtype=torch.long)
    longest_completion = max((n for row in completion_lengths for n in row), default=0)
    completion_index = torch.zeros(groups * width, longest_completion, dtype=torch.long)
    total = sum(prompt_lengths) + sum(sum(row) for row in completion_lengths)
    inverse = torch.zeros(total, dtype=torch.long)
    at = 0
    for g, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        prompt_index[g, :prompt] = torch.arange(at, at + prompt)
        inverse[at : at + prompt] = torch.arange(g * longest, g * longest + prompt)
        at += prompt
        for i, length in enumerate(completions):
            row = g * width + i
            completion_index[row, :length] = torch.arange(at, at + length)
            start = groups * longest + row * longest_completion
            inverse[at : at + length] = torch.arange(start, start + length)
            at += length
    lengths = torch.tensor(prompt_lengths)
    visible = torch.arange(longest)[None, :] < lengths[:, None]  # [P, L]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    own = torch.ones(longest_completion, longest_completion, dtype=torch.bool).tril()
    has_completions = width > 0 and longest_completion > 0
    return PackedLayout(
        prompt_index_PL=prompt_index.to(device),
        prompt_bias=_bias(causal[None, None] & visible[:, None, None, :], dtype).to(device),
        prefix_bias=_bias(visible, dtype)[:, None, None, :].to(device),
        completion_index_BL=completion_index.to(device) if has_completions else None,
        completion_bias=_bias(own, dtype)[None, None].to(device) if has_completions else None,
        inverse=inverse.to(device),
        capture=capture,
    )


def _attend_packed(
    layout: PackedLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """q [1, M*R, tokens, D], k, v [1, M, tokens, D] -> [tokens, M*R, D]."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    repeats = heads // kv_heads
    q_t = (q[0].transpose(0, 1) * scaling).reshape(-1, kv_heads, repeats, dim)  # [tokens, M, R, D]
    k_t, v_t = k[0].transpose(0, 1), v[0].transpose(0, 1)  # [tokens, M, D]

    index = layout.prompt_index_PL
    groups, longest = index.shape
    qp = q_t[index].permute(0, 2, 3, 1, 4)  # [P, M, R, L, D]
    kp, vp = k_t[index].transpose(1, 2), v_t[index].transpose(1, 2)  # [P, M, L, D]
    if layout.capture is not None:
        layout.capture.keys.append(kp.contiguous())
        layout.capture.values.append(vp.contiguous())
    qp = qp.reshape(groups, kv_heads, repeats * longest, dim)
    scores = torch.matmul(qp, kp.transpose(2, 3)).view(groups, kv_heads, repeats, longest, longest)
    scores = scores + layout.prompt_bias[:, :, None]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    out = torch.matmul(weights.view(groups, kv_heads, repeats * longest, longest), vp)
    out = out.view(groups, kv_heads, repeats, longest, dim).permute(0, 3, 1, 2, 4)
    out = out.reshape(groups * longest, heads, dim)
    if layout.completion_index_BL is None or layout.completion_bias is None:
        return out.index_select(0, layout.inverse)

    index = layout.completion_index_BL
    rows, own = index.shape
    width = rows // groups
    qc = q_t[index].permute(0, 2, 3, 1, 4)  # [B, M, R, L, D]
    kc, vc = k_t[index].transpose(1, 2), v_t[index].transpose(1, 2)  # [B, M, L, D]
    by_group = qc.reshape(groups, width, kv_heads, repeats * own, dim).transpose(1, 2)
    by_group = by_group.reshape(groups, kv_heads, width * repeats * own, dim)
    prefix = torch.matmul(by_group, kp.transpose(2, 3)) + layout.prefix_bias
    prefix = prefix.view(groups, kv_heads, width, repeats * own, longest).transpose(1, 2)
    prefix = prefix.reshape(rows, kv_heads, repeats, own, longest)
    local = torch.matmul(qc.reshape(rows, kv_heads, repeats * own, dim), kc.transpose(2, 3))
    local = local.view(rows, kv_heads, repeats, own, own) + layout.completion_bias[:, :, None]
    scores = torch.cat((prefix, local), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    w_local = weights[..., longest:].reshape(rows, kv_heads, repeats * own, own)
    w_prefix = weights[..., :longest].reshape(groups, width, kv_heads, repeats * own, longest)
    w_prefix = w_prefix.transpose(1, 2).reshape(groups, kv_heads, width * repeats * own, longest)
    from_prefix = torch.matmul(w_prefix, vp).view(groups, kv_heads, width, repeats * own, dim)
    from_prefix = from_prefix.transpose(1, 2).reshape(rows, kv_heads, repeats * own, dim)
    out_c = torch.matmul(w_local, vc) + from_prefix
    out_c = out_c.view(rows, kv_heads, repeats, own, dim).permute(0, 3, 1, 2, 4)
    out = torch.cat((out, out_c.reshape(rows * own, heads, dim)))
    return out.index_select(0, layout.inverse)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: PackedLayout | DecodeLayout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every attention layer; see the module's docstring."""
    if layout is None:
        raise InputError(
            "attention 'headwater' was called without a layout; load the model with "
            "attn_implementation='sdpa' to use it outside headwater's engine"
        )
    if sliding_window is not None:
        raise InputError(
            f"this model attends in a sliding window of {sliding_window}, expected full "
            "attention; use a model without sliding windows"
        )
    if isinstance(layout, DecodeLayout):
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return layout.attend(layer, query, key, value, scaling)[None], None
    return _attend_packed(layout, query, key, value, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)
