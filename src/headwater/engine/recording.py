"""A sampler's forward pass, kept for the training step that would compute it again.

While a model samples it goes through every token that it is then trained on, with the same
weights. What its layers came to is written down token by token and read back in the order of the
training batch: the first forward pass of a step costs a copy instead of its arithmetic. It is held
for all tokens at once, as a micro-batch's is, so that a batch is recorded only where it is one
micro-batch.

Queries lie here as the decoder has them: scaled, the halves of a head by turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwater.engine.fused_layers import LayerForward
from headwater.engine.packing import PackedGroup


@dataclass(frozen=True, slots=True)
class RecordedShape:
    """Columns of a recorded layer. scaling: of the recorded queries."""

    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    scaling: float
    has_head_norms: bool

    def columns(self) -> list[int]:
        """Widths of qkv, read, middle, gate, up, out, and of queries and keys before norms."""
        rotated = (self.query_heads + self.kv_heads) * self.head_dim
        values = self.kv_heads * self.head_dim
        widths = [rotated + values, self.query_heads * self.head_dim, self.hidden]
        widths += [self.intermediate, self.intermediate, self.hidden]
        return [*widths, rotated] if self.has_head_norms else widths


#: Every so many steps the forward pass is computed after all, to measure the sampler against it.
_MEASURED_EVERY = 16


def is_recorded(step: int) -> bool:
    """Whether the forward pass of this step (from 0) is the sampler's, in every run alike."""
    return step % _MEASURED_EVERY != 0


class RecordedForward:
    """What every layer came to on the prompts and tokens of one call of a sampler.

    most_tokens: more than that, padded, are not recorded. It is filled by a sampler, whose rows are
    numbered over all requests in order, and read once. It stays empty where the model's layers are
    not of known structure.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._layers: list[torch.Tensor] = []
        self._shape: RecordedShape | None = None
        self.was_read = False

    # --- while sampling -----------------------------------------------------------------------

    def begin(self, prompt_tokens: Sequence[int], widths: Sequence[int], limit: int) -> bool:
        """Prepare for requests of so many tokens and rows each, a row drawing `limit` tokens at
        most. False, with nothing prepared, where they are too many."""
        rows, longest = sum(widths), max(prompt_tokens, default=0)
        if len(widths) * longest + rows * limit > self._most_tokens:
            return False
        self._request_of_row = [r for r, width in enumerate(widths) for _ in range(width)]
        self._prompt_tokens, self._prompt_at = prompt_tokens, [0] * len(prompt_tokens)
        self._lines_NT = torch.zeros(rows, limit, dtype=torch.long)
        self._ids = torch.zeros(sum(prompt_tokens) + rows * (limit - 1), dtype=torch.long)
        self._now, self._end = slice(0, 0), 0
        return True

    def open(self, shape: RecordedShape, layers: int, like: torch.Tensor) -> None:
        """Make room for a model's layers, in the format and on the device of `like`."""
        self._shape = shape
        size = (self._ids.shape[0], sum(shape.columns()))
        self._layers = [like.new_empty(size) for _ in range(layers)]

    def expect_prompts(self, requests: Sequence[int], ids_T: torch.Tensor) -> None:
        """The next pass is through the prompts of these requests, one after the other."""
        start = self._end
        for request in requests:
            self._prompt_at[request] = start
            start += self._prompt_tokens[request]
        self._expect(ids_T)

    def expect_tokens(
        self, rows_B: torch.Tensor, places_B: torch.Tensor, ids_B: torch.Tensor
    ) -> None:
        """The next pass is through one token of each of these rows, the place-th it has drawn."""
        self._expect(ids_B)
        self._lines_NT[rows_B, places_B] = torch.arange(self._now.start, self._now.stop)

    def _expect(self, ids_T: torch.Tensor) -> None:
        self._now = slice(self._end, self._end + ids_T.shape[0])
        self._end = self._now.stop
        self._ids[self._now] = ids_T

    def write(self, layer: int, parts: Sequence[torch.Tensor]) -> None:
        """What a layer came to in this pass: parts [tokens, columns] as in `RecordedShape`."""
        torch.cat(tuple(parts), 1, out=self.lines(layer))

    def lines(self, layer: int) -> torch.Tensor:
        """Where what a layer comes to in this pass belongs, [tokens, columns] as in
        `RecordedShape`."""
        return self._layers[layer][self._now]

    def drop(self) -> None:
        """Give the memory back; there is nothing to read any more."""
        self._layers = []

    # --- while training -----------------------------------------------------------------------

    def read(self, groups: Sequence[PackedGroup], ids_T: torch.Tensor) -> RecordedBatch | None:
        """The recorded pass over these groups, whose tokens in packing order are ids [T].

        A group's row numbers are those of the sampler. None where there is nothing (any more).
        """
        if not self._layers:
            return None
        assert self._shape is not None
        parts = []
        for group in groups:
            start = self._prompt_at[self._request_of_row[group.rows[0]]]
            parts.append(torch.arange(start, start + len(group.prompt_ids)))
        for group in groups:
            for row, completion in zip(group.rows, group.completions, strict=True):
                parts.append(self._lines_NT[row, : max(len(completion) - 1, 0)])
        lines_T = torch.cat(parts)
        if not torch.equal(self._ids[lines_T], ids_T):
            raise ValueError("these are not the tokens that were recorded")
        layers, self._layers, self.was_read = self._layers, [], True
        return RecordedBatch(self._shape, layers, lines_T)


class RecordedBatch:
    """A recorded pass in the order of a training batch.

    Called with a layer's number, from 0 on, once each: what was given is freed with the reader.
    """

    def __init__(
        self, shape: RecordedShape, layers: list[torch.Tensor], lines_T: torch.Tensor
    ) -> None:
        self._shape, self._lines_T = shape, lines_T
        self._left = layers[::-1]
        self._count = len(layers)

    def __call__(self, layer: int) -> LayerForward:
        if layer != self._count - len(self._left):
            raise ValueError(f"layer {layer} is not the next of {self._count} recorded ones")
        shape, recorded = self._shape, self._left.pop()
        columns = recorded.split(shape.columns(), dim=1)
        parts = [part.index_select(0, self._lines_T) for part in columns]
        qkv, read, middle, gate, up, out, *raw = parts
        heads = qkv.unflatten(1, (-1, shape.head_dim))
        counts = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        q, k, v = heads.split(counts, dim=1)
        return LayerForward(
            out=out,
            qkv=(_halves(q).div_(shape.scaling), _halves(k), v.contiguous()),
            raw=self._raw(raw[0]) if raw else None,
            read=read,
            middle=middle,
            gate=gate,
            up=up,
        )

    def _raw(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = columns.unflatten(1, (-1, self._shape.head_dim))
        q, k = heads.split((self._shape.query_heads, self._shape.kv_heads), dim=1)
        return _halves(q), _halves(k)


def _halves(heads_TXD: torch.Tensor) -> torch.Tensor:
    """Heads whose halves lie by turns, with one half behind the other."""
    return heads_TXD.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
