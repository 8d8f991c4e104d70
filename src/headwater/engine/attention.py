"""Attention over groups of rollouts that share their prompt, forward and backward.

Scores exist for a bounded piece of work at a time and are made again in the backward pass, so
that memory does not grow with tokens squared; where all of a layer's are few, their softmax is
kept instead. Suffixes: R query heads per kv head; others as in `headwater.engine.layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from headwater.engine.layout import Block, PackedLayout, mask_bias

#: Scores that exist at once: 8 MiB of float32, which stays in the caches of a CPU; more only
#: where the fewest positions of a single group have more.
_SCORES_AT_ONCE = 1 << 21
#: Scores of a layer up to which its weights are kept for the backward pass: 8 MiB of bfloat16.
_SCORES_KEPT = 1 << 22
_FEWEST_QUERIES = 16


def attend(
    layout: PackedLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    keep: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of every token: q [tokens, M*R, D], k and v [tokens, M, D]; returns q's shape.

    keep: filled with what spares `attend_backward` work, where that is little.
    """
    parts = _parts(layout, q, k, v, scaling)
    if sum(part.scores() for part in parts) > _SCORES_KEPT:
        keep = None
    out = [part.layout_out(part.forward(keep)) for part in parts]
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
    kept: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given that of `attend`'s result and what it kept."""
    parts = _parts(layout, q, k, v, scaling)
    grads_q, grads_k, grads_v = [], [], []
    left = list(kept)
    for part in reversed(parts):  # completions first: they also reach the prompts' keys
        mine = [left.pop() for _ in part.cuts()][::-1] if left else None
        grad_q, grad_k, grad_v = part.backward(part.layout_in(grad_out, zeros=True), mine)
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
        self._grads: _KeyGrads | None = None

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

    def forward(self, keep: list[torch.Tensor] | None) -> torch.Tensor:
        """What every query reads: [P, M, G, R, L, D]; adds each piece's weights to `keep`."""
        out = torch.empty_like(self.q)
        for piece in self.pieces():
            weights = piece.weights()
            if keep is not None:
                keep.append(weights)
            read = torch.bmm(piece.own(weights), piece.v)
            if self.prefix is not None:
                prompt_v = piece.prefix_of(self.prefix.v)
                piece.by_group(read).baddbmm_(piece.shared(weights), prompt_v)
            piece.of(out).copy_(read.view_as(piece.of(out)))
        return out

    def backward(
        self, grad: torch.Tensor, kept: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the scaled queries, keys and values, given [P, M, G, R, L, D].

        Those of the prefix are handed to its part, which adds its own to them. kept: the weights
        of every piece, or None to make them again.
        """
        grad_q = torch.empty_like(self.q)
        own = self._grads or _KeyGrads(self, self)
        shared = None if self.prefix is None else _KeyGrads(self.prefix, self)
        for number, piece in enumerate(self.pieces()):
            wanted = piece.queries_of(grad)
            weights = piece.weights() if kept is None else kept[number]
            scores = torch.empty_like(weights)
            piece.own(scores).copy_(torch.bmm(wanted, piece.v.mT))
            own.add_to_values(piece.keys_of, piece.own(weights), wanted)
            if shared is not None:
                of_prompt = piece.by_group(wanted)
                torch.bmm(of_prompt, piece.prefix_of(shared.owner.v).mT, out=piece.shared(scores))
                shared.add_to_values(piece.prefix_of, piece.shared(weights), of_prompt)
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            found = torch.bmm(piece.own(scores), piece.k)
            own.add_to_keys(piece.keys_of, piece.own(scores), piece.q)
            if shared is not None:
                of_prompt = piece.shared(scores)
                piece.by_group(found).baddbmm_(of_prompt, piece.prefix_of(shared.owner.k))
                shared.add_to_keys(piece.prefix_of, of_prompt, piece.by_group(piece.q))
            piece.of(grad_q).copy_(found.view_as(piece.of(grad_q)))
        if shared is not None:
            shared.owner._grads = shared.written()
        return grad_q, own.keys.to(self.k.dtype), own.values.to(self.v.dtype)

    def scores(self) -> int:
        """Scores of all queries on all keys, seen or not."""
        groups, kv_heads, width, repeats, length, _ = self.q.shape
        return groups * kv_heads * width * repeats * length * self._keys()

    def _span(self) -> int:
        """Positions whose queries are taken together: all, unless one group has too many scores."""
        _, kv_heads, width, repeats, length, _ = self.q.shape
        span = _SCORES_AT_ONCE // (kv_heads * width * repeats * self._keys())
        return min(length, max(_FEWEST_QUERIES, span))

    def in_spans(self) -> bool:
        """Whether a row's queries are in more than one piece."""
        return self._span() < self.block.length

    def _keys(self) -> int:
        """Keys that the last query of a row sees."""
        return self.block.length + (0 if self.prefix is None else self.prefix.block.length)

    def pieces(self) -> Iterator[_Piece]:
        """This part's work, cut up."""
        for groups, positions in self.cuts():
            yield _Piece(self, groups, positions)

    def cuts(self) -> Iterator[tuple[slice, slice]]:
        """Whole groups, or a span of positions of one group where its scores are too many."""
        groups, kv_heads, width, repeats, length, _ = self.q.shape
        span = self._span()
        at_once = max(1, _SCORES_AT_ONCE // (kv_heads * width * repeats * length * self._keys()))
        for group in range(0, groups, at_once if span == length else 1):
            chosen = slice(group, min(group + at_once, groups))
            for start in range(0, length, span):
                yield chosen, slice(start, min(start + span, length))


class _KeyGrads:
    """Gradients of a part's keys and values, to which the pieces of those that read them add.

    Where every key is read by one piece alone they are written, not added; where by many, they
    are float32 or better.
    """

    def __init__(self, owner: _Part, readers: _Part) -> None:
        self.owner = owner
        many = readers.in_spans() or owner.in_spans()
        dtype = owner.k.dtype
        if many:
            dtype = torch.promote_types(dtype, torch.float32)
        make = torch.zeros_like if many else torch.empty_like
        self.keys, self.values = make(owner.k, dtype=dtype), make(owner.v, dtype=dtype)
        self._written = many

    def add_to_keys(self, part_of: _PartOf, scores: torch.Tensor, queries: torch.Tensor) -> None:
        """Add scores.T @ queries to the keys that `part_of` picks."""
        self._add(part_of(self.keys), scores, queries)

    def add_to_values(self, part_of: _PartOf, weights: torch.Tensor, grad: torch.Tensor) -> None:
        """Add weights.T @ grad to the values that `part_of` picks."""
        self._add(part_of(self.values), weights, grad)

    def written(self) -> _KeyGrads:
        """From now on there is something to add to."""
        self._written = True
        return self

    def _add(self, total: torch.Tensor, scores: torch.Tensor, right: torch.Tensor) -> None:
        """total + scores.T @ right; a product's left side is copied if it is transposed, so that
        many scores are put on the right."""
        if scores.shape[-1] >= right.shape[-1]:
            product = torch.bmm(right.mT, scores).mT
            if self._written:
                total.add_(product)
            else:
                total.copy_(product)
        elif not self._written:
            torch.bmm(scores.mT, right, out=total)
        elif total.dtype == scores.dtype:
            total.baddbmm_(scores.mT, right)
        else:
            total.add_(torch.bmm(scores.mT, right))


_PartOf = Callable[[torch.Tensor], torch.Tensor]


class _Piece:
    """Some groups' queries at some positions, with the keys they see.

    Scores and weights are [P*M*G, R*L, prompt keys + own keys].
    """

    def __init__(self, part: _Part, groups: slice, positions: slice) -> None:
        self._part, self._groups, self._positions = part, groups, positions
        rows = (groups.stop - groups.start) * part.kv_heads * part.width
        self._queries_shape = (rows, -1, part.q.shape[-1])
        self.q = self.queries_of(part.q)
        self.k, self.v = self.keys_of(part.k), self.keys_of(part.v)
        self._prompt_keys = 0 if part.prefix is None else part.prefix.block.length

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """This piece of [P, M, G, R, L, D]."""
        return x[self._groups, :, :, :, self._positions]

    def queries_of(self, x: torch.Tensor) -> torch.Tensor:
        """The same, [P*M*G, R*L, D]; a view where all positions are taken."""
        return self.of(x).reshape(self._queries_shape).contiguous()

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
