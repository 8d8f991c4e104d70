"""Keys and values while decoding: prompts shared by their rows, own tokens written in place.

Heads come first, [M, B, ...]: the rows of a prompt then lie together, and what they share is a
view. B rows in the batch; W rows of a prompt; C room for own tokens; others as in
`headwater.engine.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwater.engine.layout import PromptCache, mask_bias

#: The cache grows by this many tokens, or by an eighth of itself once that is more. On a GPU
#: every growth costs a new recording of the step, as rows that leave or join do.
_BLOCK_TOKENS = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True, slots=True)
class _LayerViews:
    """One layer's cache as its products read it; made once, for a view costs what an op does."""

    slots: torch.Tensor  # [2M, B, C, D], keys then values
    keys: torch.Tensor  # [M*B, D, C]
    values: torch.Tensor  # [M*B, C, D]
    prompt_keys: torch.Tensor  # [M*P, D, L]
    prompt_values: torch.Tensor  # [M*P, L, D]

    @classmethod
    def of(cls, own: torch.Tensor, prompt: torch.Tensor) -> _LayerViews:
        """Views of a layer's own [2, M, B, C, D] and prompt [2, M, P, L, D] cache."""
        return cls(
            own.flatten(0, 1),
            own[0].flatten(0, 1).mT,
            own[1].flatten(0, 1),
            prompt[0].flatten(0, 1).mT,
            prompt[1].flatten(0, 1),
        )


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
        # keys and values in one tensor a layer: [2, M, P, L, D]
        self._prompt = [
            torch.stack((k, v)).transpose(1, 2).contiguous()
            for k, v in zip(prompts.keys, prompts.values, strict=True)
        ]
        first = self._prompt[0]
        self._device, self._dtype = first.device, first.dtype
        self._kv_heads = first.shape[1]
        self._prompt_lengths = torch.tensor(prompt_lengths, device=self._device)
        self._group_of_rows = group_of_rows
        self._lengths_B = torch.zeros_like(group_of_rows)  # own tokens already in the cache
        self.generation, self._longest = 0, 0
        self._even = self._on_cpu = self._device.type == "cpu"
        self._block = _BLOCK_TOKENS[self._device.type]
        self._capacity = self._block
        rows, dim = group_of_rows.shape[0], first.shape[-1]
        shape = (2, self._kv_heads, rows, self._capacity, dim)
        self._own = [first.new_zeros(shape) for _ in self._prompt]
        self._own_bias = torch.empty(0)
        self._views: list[_LayerViews] = []
        self._set_grid()

    @property
    def rows(self) -> int:
        """Rows still decoding."""
        return int(self._group_of_rows.shape[0])

    @property
    def lengths(self) -> torch.Tensor:
        """Own tokens of every row in the cache, int64 [B]."""
        return self._lengths_B

    @property
    def prompt_of_rows(self) -> torch.Tensor:
        """The prompt of every row, int64 [B]."""
        return self._group_of_rows

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """Tokens of every prompt, int64 [P]."""
        return self._prompt_lengths

    @property
    def caches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Every layer's own [2, M, B, C, D] and prompt [2, M, P, L, D] keys and values."""
        return self._own, self._prompt

    def prepare(self) -> None:
        """Make room for one more token a row."""
        if self._longest == self._capacity:
            self._grow(self._capacity + max(self._block, self._capacity // 8))
            self._set_views()

    def begin(self) -> None:
        """Mask what no row has written yet."""
        places = torch.arange(self._capacity, device=self._device)
        if self._even:
            self._own_bias = mask_bias(places <= self._longest, self._dtype)
        else:
            seen = places[None, :] <= self._lengths_B[:, None]
            self._own_bias = mask_bias(seen, self._dtype)[:, None, :].repeat(self._kv_heads, 1, 1)

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
        self._select(self._own, kept_rows)
        self._group_of_rows = self._group_of_rows[kept_rows]
        self._lengths_B = self._lengths_B[kept_rows]
        self._longest = int(self._lengths_B.max()) if self.rows else 0
        self._even = self._on_cpu and bool((self._lengths_B == self._longest).all())
        self._set_grid()

    def join(self, other: DecodeLayout) -> None:
        """Let in the rows of `other`, prompts and all; they come behind the present ones."""
        self._views, other._views = [], []
        capacity = max(self._capacity, other._capacity)
        self._grow(capacity)
        other._grow(capacity)
        longest = max(self._prompt[0].shape[3], other._prompt[0].shape[3])
        for layer in range(len(self._own)):  # one at a time: the old one is freed at once
            self._own[layer] = torch.cat((self._own[layer], other._own[layer]), 2)
            both = (self._prompt[layer], other._prompt[layer])
            self._prompt[layer] = torch.cat([_stretched(cache, longest) for cache in both], 2)
        offset = self._prompt_lengths.shape[0]
        self._prompt_lengths = torch.cat((self._prompt_lengths, other._prompt_lengths))
        self._group_of_rows = torch.cat((self._group_of_rows, other._group_of_rows + offset))
        self._lengths_B = torch.cat((self._lengths_B, other._lengths_B))
        self._even = self._even and other._even and self._longest == other._longest
        self._longest = max(self._longest, other._longest)
        self._set_grid()

    def attend(self, layer: int, qkv_BXD: torch.Tensor) -> torch.Tensor:
        """The newest token of every row: returns [B, M*R * D].

        qkv: X = M*R query heads, times the scale of the scores, then M heads of keys and M of
        values.
        """
        views, rows, kv_heads = self._views[layer], qkv_BXD.shape[0], self._kv_heads
        queries = qkv_BXD.shape[1] - 2 * kv_heads
        repeats, dim = queries // kv_heads, qkv_BXD.shape[2]
        by_head = qkv_BXD.transpose(0, 1)
        if self._even:
            views.slots.select(2, self._longest).copy_(by_head[queries:])
        else:
            row = torch.arange(rows, device=qkv_BXD.device)
            views.slots[:, row, self._lengths_B] = by_head[queries:]
        q = qkv_BXD[:, :queries].view(rows, kv_heads, repeats, dim).transpose(0, 1).contiguous()
        own = torch.bmm(q.view(-1, repeats, dim), views.keys).add_(self._own_bias)
        shared = torch.bmm(self._by_prompt(q), views.prompt_keys)
        if self._prefix_bias is not None:
            shared.add_(self._prefix_bias)
        scores = torch.cat((self._by_row(shared, repeats), own), dim=-1)
        to_prompt, to_own = torch.softmax(scores, dim=-1).split(
            (shared.shape[-1], self._capacity), dim=-1
        )
        read = torch.bmm(to_own, views.values)
        grouped = self._by_prompt(to_prompt.unflatten(0, (kv_heads, rows)))
        if self._rectangular:
            read.view(grouped.shape[0], -1, dim).baddbmm_(grouped, views.prompt_values)
        else:
            read.add_(self._by_row(torch.bmm(grouped, views.prompt_values), repeats))
        return read.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1)

    def _grow(self, capacity: int) -> None:
        if capacity > self._capacity:
            self._views = []  # they would keep the old memory
            for layer, old in enumerate(self._own):  # one at a time: the old one is freed at once
                self._own[layer] = _stretched(old, capacity)
            self._capacity = capacity

    def _select(self, caches: list[torch.Tensor], kept: torch.Tensor) -> None:
        self._views = []
        for layer, old in enumerate(caches):  # one at a time: the old one is freed at once
            caches[layer] = old.index_select(2, kept)

    def _set_views(self) -> None:
        pairs = zip(self._own, self._prompt, strict=True)
        self._views = [_LayerViews.of(own, prompt) for own, prompt in pairs]
        self.generation += 1

    def _set_grid(self) -> None:
        """Rows as a [P, W] grid, W the most rows any prompt has; drops prompts without rows."""
        used, group = torch.unique_consecutive(self._group_of_rows, return_inverse=True)
        if used.shape[0] < self._prompt_lengths.shape[0]:
            self._select(self._prompt, used)
            self._prompt_lengths = self._prompt_lengths.index_select(0, used)
            self._group_of_rows = group
        longest = self._prompt[0].shape[3]
        visible = torch.arange(longest, device=self._device) < self._prompt_lengths[:, None]
        bias = mask_bias(visible, self._dtype)[:, None, :].repeat(self._kv_heads, 1, 1)
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
        self._set_views()

    def _by_prompt(self, x_MBRX: torch.Tensor) -> torch.Tensor:
        """[M, B, R, X] to [M*P, W*R, X]; a view where every prompt has W rows."""
        if not self._rectangular:
            x_MBRX = x_MBRX.index_select(1, self._row_of_cell)
        _, _, repeats, last = x_MBRX.shape
        return x_MBRX.view(self._kv_heads * self._groups, self._width * repeats, last)

    def _by_row(self, x: torch.Tensor, repeats: int) -> torch.Tensor:
        """[M*P, W*R, X] to [M*B, R, X]."""
        if self._rectangular:
            return x.view(-1, repeats, x.shape[-1])
        cells = x.view(self._kv_heads, -1, repeats, x.shape[-1])
        return cells.index_select(1, self._cell_of_row).flatten(0, 1)


def _stretched(cache: torch.Tensor, length: int) -> torch.Tensor:
    """[2, M, B, C, D] with zeros behind, up to `length`."""
    return torch.nn.functional.pad(cache, (0, 0, 0, length - cache.shape[3]))
