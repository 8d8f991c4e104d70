"""Keys and values while decoding: prompts shared by their rows, own tokens written in place.

Heads come first, [M, B, ...]: the rows of a prompt then lie together, and what they share is a
view. B rows in the batch; W rows of a prompt; others as in `headwater.engine.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.engine.attention import PromptCache, mask_bias

#: The cache grows by this many tokens, or by an eighth of itself once that is more. On a GPU
#: every growth costs a new recording of the step.
_BLOCK_TOKENS = {"cpu": 32, "cuda": 128}


class DecodeLayout:
    """Rows that each extend by one token a step and share their prompt's keys and values.

    Rows are ordered by prompt. `keep` drops finished rows, `join` lets new prompts' rows in while
    the others are under way: each row has a length of its own.

    A step is `prepare` (sizes), `begin`, every layer's `attend` and `end` (tensors alone, so that
    a GPU can record them), then `advance`. `generation` changes whenever a tensor is replaced.
    """

    def __init__(
        self, prompts: PromptCache, prompt_lengths: Sequence[int], group_of_rows: torch.Tensor
    ) -> None:
        self._prompt_keys = [k.transpose(0, 1).contiguous() for k in prompts.keys]  # [M, P, L, D]
        self._prompt_values = [v.transpose(0, 1).contiguous() for v in prompts.values]
        first = self._prompt_keys[0]
        self._device, self._dtype = first.device, first.dtype
        self._prompt_lengths = torch.tensor(prompt_lengths, device=self._device)
        self._group_of_rows = group_of_rows
        self._lengths_B = torch.zeros_like(group_of_rows)  # own tokens already in the cache
        self.generation, self._longest = 0, 0
        self._even = self._on_cpu = self._device.type == "cpu"
        self._block = _BLOCK_TOKENS[self._device.type]
        self._capacity = self._block
        shape = (first.shape[0], group_of_rows.shape[0], self._capacity, first.shape[3])
        self._keys = [first.new_zeros(shape) for _ in prompts.keys]
        self._values = [first.new_zeros(shape) for _ in prompts.keys]
        self._own_bias = torch.empty(0)
        self._set_grid()

    @property
    def rows(self) -> int:
        """Rows still decoding."""
        return int(self._group_of_rows.shape[0])

    def prepare(self) -> None:
        """Make room for one more token a row."""
        if self._longest == self._capacity:
            self._grow(self._capacity + max(self._block, self._capacity // 8))

    def begin(self) -> None:
        """Mask what no row has written yet."""
        places = torch.arange(self._capacity, device=self._device)
        if self._even:
            self._own_bias = mask_bias(places <= self._longest, self._dtype)
        else:
            seen = places[None, :] <= self._lengths_B[:, None]
            self._own_bias = mask_bias(seen, self._dtype)[:, None, :]

    def end(self) -> None:
        """The token written by the last forward becomes visible to later steps."""
        self._lengths_B.add_(1)

    def advance(self) -> None:
        """Count the step."""
        self._longest += 1

    def lengths_kept(self) -> torch.Tensor:
        """A copy of every row's length, to go back to with `restore_lengths`."""
        return self._lengths_B.clone()

    def restore_lengths(self, lengths_B: torch.Tensor) -> None:
        """Forget tokens written since: their places are written anew."""
        self._lengths_B.copy_(lengths_B)

    def keep(self, kept_rows: torch.Tensor) -> None:
        """Drop every row but `kept_rows` (int64 positions, ascending)."""
        self._keys = [k.index_select(1, kept_rows) for k in self._keys]
        self._values = [v.index_select(1, kept_rows) for v in self._values]
        self._group_of_rows = self._group_of_rows[kept_rows]
        self._lengths_B = self._lengths_B[kept_rows]
        self._longest = int(self._lengths_B.max()) if self.rows else 0
        self._even = self._on_cpu and bool((self._lengths_B == self._longest).all())
        self._set_grid()

    def join(self, other: DecodeLayout) -> None:
        """Let in the rows of `other`, prompts and all; they come behind the present ones."""
        longest = max(self._prompt_keys[0].shape[2], other._prompt_keys[0].shape[2])
        capacity = max(self._capacity, other._capacity)
        self._grow(capacity)
        other._grow(capacity)
        for mine, theirs in (
            (self._prompt_keys, other._prompt_keys),
            (self._prompt_values, other._prompt_values),
            (self._keys, other._keys),
            (self._values, other._values),
        ):
            is_prompt = mine is self._prompt_keys or mine is self._prompt_values
            length = longest if is_prompt else capacity
            for layer, new in enumerate(theirs):  # one at a time: the old one is freed at once
                mine[layer] = torch.cat(
                    (_stretched(mine[layer], length), _stretched(new, length)), 1
                )
        offset = self._prompt_lengths.shape[0]
        self._prompt_lengths = torch.cat((self._prompt_lengths, other._prompt_lengths))
        self._group_of_rows = torch.cat((self._group_of_rows, other._group_of_rows + offset))
        self._lengths_B = torch.cat((self._lengths_B, other._lengths_B))
        self._even = self._even and other._even and self._longest == other._longest
        self._longest = max(self._longest, other._longest)
        self._set_grid()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """q [B, M*R, D], k and v [B, M, D] of the newest token; returns [B, M*R * D]."""
        rows, kv_heads, dim = k.shape
        keys, values = self._keys[layer], self._values[layer]
        if self._even:
            keys.select(2, self._longest).copy_(k.transpose(0, 1))
            values.select(2, self._longest).copy_(v.transpose(0, 1))
        else:
            row = torch.arange(rows, device=k.device)
            keys[:, row, self._lengths_B] = k.transpose(0, 1)
            values[:, row, self._lengths_B] = v.transpose(0, 1)
        q_BMRD = q.view(rows, kv_heads, -1, dim)
        repeats = q_BMRD.shape[2]
        q_MBRD = q.new_empty(kv_heads, rows, repeats, dim)
        torch.mul(q_BMRD.transpose(0, 1), scaling, out=q_MBRD)

        prompt_keys, prompt_values = self._prompt_keys[layer], self._prompt_values[layer]
        length = prompt_keys.shape[2]
        shared = torch.bmm(self._by_prompt(q_MBRD), prompt_keys.view(-1, length, dim).mT)
        if self._prefix_bias is not None:
            shared.view(kv_heads, -1, shared.shape[1], length).add_(self._prefix_bias)
        own = torch.bmm(q_MBRD.view(-1, repeats, dim), keys.view(-1, self._capacity, dim).mT).view(
            kv_heads, rows, repeats, -1
        )
        own.add_(self._own_bias)
        shared = self._by_row(shared, kv_heads, repeats)
        weights = torch.softmax(torch.cat((shared, own), dim=-1), dim=-1)
        read = torch.bmm(
            weights[..., length:].flatten(0, 1), values.view(-1, self._capacity, dim)
        ).view(kv_heads, rows, repeats, dim)
        to_prompt = self._by_prompt(weights[..., :length])
        if self._rectangular:
            read.view(-1, to_prompt.shape[1], dim).baddbmm_(
                to_prompt, prompt_values.view(-1, length, dim)
            )
        else:
            from_prompt = torch.bmm(to_prompt, prompt_values.view(-1, length, dim))
            read.add_(self._by_row(from_prompt, kv_heads, repeats))
        return read.transpose(0, 1).reshape(rows, -1)

    def _grow(self, capacity: int) -> None:
        if capacity == self._capacity:
            return
        for cache in (self._keys, self._values):
            for layer, old in enumerate(cache):  # one at a time: the old one is freed at once
                cache[layer] = _stretched(old, capacity)
        self._capacity = capacity
        self.generation += 1

    def _set_grid(self) -> None:
        """Rows as a [P, W] grid, W the most rows any prompt has; drops prompts without rows."""
        self.generation += 1
        used, group = torch.unique_consecutive(self._group_of_rows, return_inverse=True)
        if used.shape[0] < self._prompt_lengths.shape[0]:
            self._prompt_keys = [k.index_select(1, used) for k in self._prompt_keys]
            self._prompt_values = [v.index_select(1, used) for v in self._prompt_values]
            self._prompt_lengths = self._prompt_lengths.index_select(0, used)
            self._group_of_rows = group
        longest = self._prompt_keys[0].shape[2]
        visible = torch.arange(longest, device=self._device) < self._prompt_lengths[:, None]
        bias = mask_bias(visible, self._dtype)[:, None, :]
        self._prefix_bias = None if bool(visible.all()) else bias
        counts = torch.bincount(group)
        self._width = int(counts.max()) if self.rows else 0
        self._groups = int(used.shape[0])
        starts = torch.cumsum(counts, 0) - counts
        within = torch.arange(group.shape[0], device=self._device) - starts[group]
        self._cell_of_row = group * self._width + within
        self._rectangular = bool((counts == self._width).all())
        row_of_cell = torch.zeros(self._groups * self._width, dtype=torch.long, device=self._device)
        row_of_cell[self._cell_of_row] = torch.arange(group.shape[0], device=self._device)
        self._row_of_cell = row_of_cell

    def _by_prompt(self, x_MBRX: torch.Tensor) -> torch.Tensor:
        """[M, B, R, X] to [M*P, W*R, X]; a view where every prompt has W rows."""
        if not self._rectangular:
            x_MBRX = x_MBRX.index_select(1, self._row_of_cell)
        kv_heads, _, repeats, last = x_MBRX.shape
        return x_MBRX.view(kv_heads * self._groups, self._width * repeats, last)

    def _by_row(self, x: torch.Tensor, kv_heads: int, repeats: int) -> torch.Tensor:
        """[M*P, W*R, X] to [M, B, R, X]."""
        cells = x.view(kv_heads, -1, repeats, x.shape[-1])
        return cells if self._rectangular else cells.index_select(1, self._cell_of_row)


def _stretched(cache: torch.Tensor, length: int) -> torch.Tensor:
    """[M, B, L, D] with zeros behind, up to `length`."""
    return torch.nn.functional.pad(cache, (0, 0, 0, length - cache.shape[2]))
