"""Attention over groups of rollouts that share their prompt, forward and backward.

Tokens of many groups lie flat, without padding, in one row: all prompts, then all completions.
Every linear layer of the model works on just these. Only attention needs to know which token
sees which: a completion sees its group's prompt, computed once, and its own earlier tokens.

Scores exist for a bounded piece of work at a time and are made again in the backward pass, so
that memory does not grow with tokens squared. Suffixes: M kv heads, R query heads per kv head,
D head dimension, L length of a padded block; others as in `headwater.types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Scores that exist at once: 8 MiB of float32, which stays in the caches of a CPU.
_SCORES_AT_ONCE = 1 << 21
_FEWEST_QUERIES = 16


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


def attend(
    layout: PackedLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of every token: q [tokens, M*R, D], k and v [tokens, M, D]; returns q's shape."""
    parts = _parts(layout, q, k, v, scaling)
    out = [part.layout_out(part.forward()) for part in parts]
    if layout.capture is not None:
        shape = (layout.prompts.rows, k.shape[1], layout.prompts.length, k.shape[2])
        layout.capture.keys.append(parts[0].k.view(shape))
        layout.capture.values.append(parts[0].v.view(shape))
    return out[0] if len(out) == 1 else torch.cat(out)


def attend_backward(
    layout: PackedLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given that of `attend`'s result."""
    parts = _parts(layout, q, k, v, scaling)
    grads_q, grads_k, grads_v = [], [], []
    for part in reversed(parts):  # completions first: they also reach the prompts' keys
        grad_q, grad_k, grad_v = part.backward(part.layout_in(grad_out, zeros=True))
        grads_q.append(part.layout_out(grad_q.mul_(scaling)))
        grads_k.append(part.keys_out(grad_k))
        grads_v.append(part.keys_out(grad_v))
    if len(parts) == 1:
        return grads_q[0], grads_k[0], grads_v[0]
    return torch.cat(grads_q[::-1]), torch.cat(grads_k[::-1]), torch.cat(grads_v[::-1])


def _parts(
    layout: PackedLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> list[_Part]:
    """Prompts, which see themselves, and completions, which also see their prompt."""
    kv_heads = k.shape[1]
    prompts = _Part(layout.prompts, slice(0, layout.prompt_tokens), layout.prompts.rows, kv_heads)
    prompts.load(q, k, v, scaling)
    if layout.completions is None:
        return [prompts]
    completions = _Part(
        layout.completions, slice(layout.prompt_tokens, None), layout.prompts.rows, kv_heads
    )
    completions.load(q, k, v, scaling)
    completions.prefix, completions.prefix_bias = prompts, layout.prefix_bias
    return [prompts, completions]


class _Part:
    """Rows of one block by groups: queries [P, M, G, R, L, D], keys and values [P*M*G, L, D].

    In this order a group's queries lie together for the prompt they share, and each row's for
    its own keys, without a copy between the two.
    """

    def __init__(self, block: Block, tokens: slice, groups: int, kv_heads: int) -> None:
        self.block, self.tokens = block, tokens
        self.groups, self.kv_heads = groups, kv_heads
        self.width = block.rows // groups
        self.prefix: _Part | None = None
        self.prefix_bias: torch.Tensor | None = None
        self._grads: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        """Queries (times `scaling`), keys and values of this part's tokens."""
        self.q = self.layout_in(q, scaling)
        self.k, self.v = self.keys_in(k), self.keys_in(v)

    # --- between the flat row and this order ------------------------------------------------

    def layout_in(self, x: torch.Tensor, factor: float = 1.0, zeros: bool = False) -> torch.Tensor:
        """[all tokens, M*R, D] times `factor` to a new [P, M, G, R, L, D]."""
        own = x[self.tokens]
        padded = self.block.pad_zeros(own) if zeros else self.block.pad(own)
        shape = (self.groups, self.width, self.block.length, self.kv_heads, -1, x.shape[-1])
        ordered = padded.view(shape).permute(0, 3, 1, 4, 2, 5)
        return torch.mul(ordered, factor, out=x.new_empty(ordered.shape))

    def layout_out(self, x: torch.Tensor) -> torch.Tensor:
        """[P, M, G, R, L, D] to [own tokens, M*R, D]."""
        rows = x.permute(0, 2, 4, 1, 3, 5)
        heads = self.kv_heads * x.shape[3]
        shape = (self.block.rows, self.block.length, heads, x.shape[-1])
        return self.block.unpad(rows.reshape(shape))

    def keys_in(self, x: torch.Tensor) -> torch.Tensor:
        """[all tokens, M, D] to [P*M*G, L, D]."""
        padded = self.block.pad(x[self.tokens])
        shape = (self.groups, self.width, self.block.length, self.kv_heads, x.shape[-1])
        ordered = padded.view(shape).permute(0, 3, 1, 2, 4)
        return ordered.reshape(-1, self.block.length, x.shape[-1])

    def keys_out(self, x: torch.Tensor) -> torch.Tensor:
        """[P*M*G, L, D] to [own tokens, M, D]."""
        shape = (self.groups, self.kv_heads, self.width, self.block.length, x.shape[-1])
        rows = x.view(shape).permute(0, 2, 3, 1, 4)
        return self.block.unpad(rows.reshape(self.block.rows, self.block.length, *rows.shape[3:]))

    # --- the work ---------------------------------------------------------------------------

    def forward(self) -> torch.Tensor:
        """What every query reads: [P, M, G, R, L, D]."""
        out = torch.empty_like(self.q)
        for piece in self._pieces():
            weights = piece.weights()
            read = torch.bmm(piece.own(weights), piece.v)
            if self.prefix is not None:
                prompt_v = piece.prefix_of(self.prefix.v)
                piece.by_group(read).baddbmm_(piece.shared(weights), prompt_v)
            piece.of(out).copy_(read.view_as(piece.of(out)))
        return out

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the scaled queries, keys and values, given [P, M, G, R, L, D].

        Those of the prefix are handed to its part, which adds its own to them.
        """
        grad_q, prefix = torch.empty_like(self.q), self.prefix
        grads = self._grads or self._zero_grads(self)
        if prefix is not None:
            prefix._grads = prefix._zero_grads(self)
        for piece in self._pieces():
            wanted = piece.of(grad).reshape(piece.q.shape)
            weights = piece.weights()
            scores = torch.empty_like(weights)
            piece.own(scores).copy_(torch.bmm(wanted, piece.v.mT))
            _add_product(piece.keys_of(grads[1]), piece.own(weights).mT, wanted)
            if prefix is not None and prefix._grads is not None:
                torch.bmm(
                    piece.by_group(wanted), piece.prefix_of(prefix.v).mT, out=piece.shared(scores)
                )
                into = piece.prefix_of(prefix._grads[1])
                _add_product(into, piece.shared(weights).mT, piece.by_group(wanted))
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            found = torch.bmm(piece.own(scores), piece.k)
            _add_product(piece.keys_of(grads[0]), piece.own(scores).mT, piece.q)
            if prefix is not None and prefix._grads is not None:
                shared, queries = piece.shared(scores), piece.by_group(piece.q)
                piece.by_group(found).baddbmm_(shared, piece.prefix_of(prefix.k))
                _add_product(piece.prefix_of(prefix._grads[0]), shared.mT, queries)
            piece.of(grad_q).copy_(found.view_as(piece.of(grad_q)))
        return grad_q, grads[0].to(self.k.dtype), grads[1].to(self.v.dtype)

    def _zero_grads(self, readers: _Part) -> tuple[torch.Tensor, torch.Tensor]:
        """For keys and values that `readers` reach; float32 where many pieces are added up."""
        dtype = self.k.dtype
        if readers._span() < readers.block.length:
            dtype = torch.promote_types(dtype, torch.float32)
        return torch.zeros_like(self.k, dtype=dtype), torch.zeros_like(self.v, dtype=dtype)

    def _span(self) -> int:
        """Positions whose queries are taken together: all, unless one group has too many scores."""
        _, kv_heads, width, repeats, length, _ = self.q.shape
        span = _SCORES_AT_ONCE // (kv_heads * width * repeats * self._keys())
        return min(length, max(_FEWEST_QUERIES, span))

    def _keys(self) -> int:
        """Keys that the last query of a row sees."""
        return self.block.length + (0 if self.prefix is None else self.prefix.block.length)

    def _pieces(self) -> Iterator[_Piece]:
        """Whole groups, or a span of positions of one group where its scores are too many."""
        groups, kv_heads, width, repeats, length, _ = self.q.shape
        span = self._span()
        at_once = max(1, _SCORES_AT_ONCE // (kv_heads * width * repeats * length * self._keys()))
        for group in range(0, groups, at_once if span == length else 1):
            chosen = slice(group, min(group + at_once, groups))
            for start in range(0, length, span):
                yield _Piece(self, chosen, slice(start, min(start + span, length)))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, batched; `total` may be wider than the factors."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


class _Piece:
    """Some groups' queries at some positions, with the keys they see.

    Scores and weights are [P*M*G, R*L, prompt keys + own keys].
    """

    def __init__(self, part: _Part, groups: slice, positions: slice) -> None:
        self._part, self._groups, self._positions = part, groups, positions
        rows = (groups.stop - groups.start) * part.kv_heads * part.width
        self.q = self.of(part.q).reshape(rows, -1, part.q.shape[-1])
        self.k, self.v = self.keys_of(part.k), self.keys_of(part.v)
        self._prompt_keys = 0 if part.prefix is None else part.prefix.block.length

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """This piece of [P, M, G, R, L, D]."""
        return x[self._groups, :, :, :, self._positions]

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """The own keys or values these queries can see, of [P*M*G, L, D]."""
        rows = self._part.kv_heads * self._part.width
        chosen = slice(self._groups.start * rows, self._groups.stop * rows)
        return x[chosen, : self._positions.stop]

    def prefix_of(self, x: torch.Tensor) -> torch.Tensor:
        """The prompts' keys or values of these groups, of [P*M, L, D]."""
        heads = self._part.kv_heads
        return x[self._groups.start * heads : self._groups.stop * heads]

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """[P*M*G, R*L, ...] with all queries of a group together: [P*M, G*R*L, ...]."""
        return x.view(x.shape[0] // self._part.width, -1, x.shape[-1])

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The part of scores or weights that concerns a row's own keys."""
        return x[..., self._prompt_keys :]

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """The part of scores or weights that concerns the prompt's keys, by group."""
        return self.by_group(x)[..., : self._prompt_keys]

    def weights(self) -> torch.Tensor:
        """Softmax of the scores of these queries on the keys they see."""
        part, first, seen = self._part, self._positions.start, self._positions.stop
        rows, queries, _ = self.q.shape
        scores = self.q.new_empty(rows, queries, self._prompt_keys + seen)
        causal = torch.ones(seen - first, seen, dtype=torch.bool, device=self.q.device)
        torch.add(
            torch.bmm(self.q, self.k.mT).unflatten(1, (-1, seen - first)),
            mask_bias(causal.tril(first), self.q.dtype),
            out=self.own(scores).unflatten(1, (-1, seen - first)),
        )
        if part.prefix is not None:
            shared = self.shared(scores)
            torch.bmm(self.by_group(self.q), self.prefix_of(part.prefix.k).mT, out=shared)
            if part.prefix_bias is not None:
                bias = part.prefix_bias[self._groups].repeat_interleave(part.kv_heads, 0)
                shared.add_(bias)
        return torch.softmax(scores, dim=-1)


class Attend(torch.autograd.Function):
    """`attend` with its gradient, for layers that autograd differentiates."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: PackedLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.scaling = layout, scaling
        return attend(layout, q, k, v, scaling)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        return None, *attend_backward(ctx.layout, q, k, v, ctx.scaling, grad_out), None
