"""A model made ready to sample: prompts, then one token a row, with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from headwater.engine.attention import attend
from headwater.engine.compiled_step import CompiledStep, can_step
from headwater.engine.decoding import DecodeLayout
from headwater.engine.forward import head_weight, hidden_states
from headwater.engine.fused_layers import (
    LayerParameters,
    parameters_of,
    rms_norm,
    shape_of,
    widened,
)
from headwater.engine.layout import PackedLayout
from headwater.engine.packed_layer import PackedLayer, Reader
from headwater.engine.packed_linear import PackedLinear
from headwater.engine.recording import RecordedForward, RecordedShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(Protocol):
    """What the sampler needs of a model, a step at a time."""

    def prefill(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        """Final hidden states [T, H] of prompts; the layout captures their keys and values."""
        ...

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        """Final hidden states [B, H] of one new token a row; ids and positions int64 [B]."""
        ...

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Logits [B, V], the caller's own, in the model's format."""
        ...


def decoder_of(
    model: PreTrainedModel, vocab_size: int, recorded: RecordedForward | None = None
) -> Decoder:
    """The decoder that suits the model's layers; make a new one when its weights change.

    On a GPU its steps are recorded once for every shape and played back. recorded: where what
    layers come to is written, if `can_record(model)`.
    """
    layers = [parameters_of(layer) for layer in model.get_decoder().layers]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers):
        return _LibraryDecoder(model, vocab_size)
    packed = _PackedDecoder(model, known, vocab_size, recorded)
    records = packed.device.type == "cuda" and packed.can_be_recorded
    return RecordedSteps(packed, record_cuda_graph) if records else packed


#: Layers as small as the embedded models' are computed again as fast as they are copied.
SMALLEST_RECORDED = 256


def can_record(model: PreTrainedModel) -> bool:
    """Whether a decoder of this model writes down what its layers come to: on a CPU, with all
    layers of known structure, and large enough for that to be worth while."""
    body = model.get_decoder()
    weight = body.embed_tokens.weight
    if weight.device.type != "cpu" or weight.shape[1] < SMALLEST_RECORDED:
        return False
    return all(parameters_of(layer) is not None for layer in body.layers)


#: Runs a function of tensors, and returns how to run it again on what those tensors hold then.
Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def record_cuda_graph(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record `compute` as a CUDA graph, after one run on a side stream as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads may use the device meanwhile: NCCL's looks after its collectives
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


class RecordedSteps:
    """A decoder whose steps are recorded: a new recording whenever the layout's tensors change."""

    def __init__(self, decoder: Decoder, record: Record) -> None:
        self._decoder, self._record = decoder, record
        self._recorded: tuple[DecodeLayout, int] | None = None
        self._replay: Callable[[], torch.Tensor] | None = None

    def prefill(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        self._recorded, self._replay = None, None  # rows enter: what was recorded is of no use
        return self._decoder.prefill(ids_T, positions_T, layout)

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        if self._recorded != (layout, layout.generation) or self._replay is None:
            self._replay = None  # frees the old recording's memory first
            self._ids, self._positions = ids_B.clone(), positions_B.clone()
            lengths = layout.lengths_kept()
            self._replay = self._record(
                lambda: self._decoder.step(self._ids, self._positions, layout)
            )
            layout.restore_lengths(lengths)
            self._recorded = (layout, layout.generation)
        self._ids.copy_(ids_B)
        self._positions.copy_(positions_B)
        return self._replay()

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden_BH)


class _LibraryDecoder:
    """Layers of unknown structure, as the library computes them."""

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self._model = model
        self._head = PackedLinear(head_weight(model, vocab_size))

    def prefill(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        return hidden_states(self._model, ids_T[None], positions_T[None], layout)

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        layout.begin()
        hidden = hidden_states(self._model, ids_B[None], positions_B[None], layout)
        layout.end()
        return hidden

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_BH)


#: Positions whose rotations are computed at once.
_FEWEST_POSITIONS = 256


class _PackedDecoder:
    """All layers of known structure, without the library's module calls between them."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[LayerParameters],
        vocab_size: int,
        recorded: RecordedForward | None = None,
    ) -> None:
        body = model.get_decoder()
        self._embedding = body.embed_tokens.weight
        self.device = self._embedding.device
        self._rotary = body.rotary_emb
        # these look at the positions to choose their frequencies, which a recording cannot
        rope = str(getattr(body.rotary_emb, "rope_type", "default"))
        self.can_be_recorded = "dynamic" not in rope and rope != "longrope"
        self._shape = shape_of(body.layers[0])
        self._query_heads, self._kv_heads = (
            weight.shape[0] // self._shape.head_dim for weight in (layers[0].q, layers[0].k)
        )
        self._layers = [
            PackedLayer(weights, shape_of(layer))
            for weights, layer in zip(layers, body.layers, strict=True)
        ]
        self._known_tables: list[torch.Tensor] = []
        self._known_positions = 0
        self._norm, self._eps = widened(body.norm.weight), float(body.norm.variance_epsilon)
        self._head = PackedLinear(head_weight(model, vocab_size))
        self._recorded = recorded
        shape = self._shape_of_results(layers[0])
        if recorded is not None:
            recorded.open(shape, len(layers), self._embedding)
        self._compiled: CompiledStep | None = None
        if can_step(self._layers):
            self._compiled = CompiledStep(self._layers, shape, recorded)

    def _shape_of_results(self, layer: LayerParameters) -> RecordedShape:
        return RecordedShape(
            query_heads=self._query_heads,
            kv_heads=self._kv_heads,
            head_dim=self._shape.head_dim,
            hidden=layer.o.shape[0],
            intermediate=layer.gate.shape[0],
            scaling=self._shape.scaling,
            has_head_norms=layer.q_norm is not None,
        )

    def prefill(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        queries, kv_heads = self._query_heads, self._kv_heads

        def attend_prompts(qkv_TXD: torch.Tensor) -> torch.Tensor:
            q, k, v = qkv_TXD.split((queries, kv_heads, kv_heads), dim=1)
            return attend(layout, q, k, v, 1.0).flatten(1)

        return self._run(ids_T, positions_T, lambda index: attend_prompts)

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, layout: DecodeLayout
    ) -> torch.Tensor:
        layout.prepare()
        if self._compiled is not None:
            x = functional.embedding(ids_B, self._embedding)
            cosine, sine = self._tables(x, positions_B)
            x = self._compiled(x, cosine, sine, layout)
            layout.end()
            return rms_norm(x, self._norm, self._eps)
        layout.begin()
        hidden = self._run(ids_B, positions_B, lambda index: partial(layout.attend, index))
        layout.end()
        return hidden

    def logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_BH)

    def _run(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, reader: Callable[[int], Reader]
    ) -> torch.Tensor:
        """Final hidden states [B, H] of B tokens; `reader` has each layer's attention."""
        x = functional.embedding(ids_B, self._embedding)
        cis_BXd = self._rotations(x, positions_B)
        recorded = self._recorded
        for index, layer in enumerate(self._layers):
            writer = None if recorded is None else partial(recorded.write, index)
            x = layer(x, cis_BXd, reader(index), writer)
        return rms_norm(x, self._norm, self._eps)

    def _rotations(self, x: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """What every head's pairs are multiplied with, complex [B, heads + 2M, D/2].

        Queries are scaled on the way; values stay as they are.
        """
        cis = torch.complex(*(one[:, None] for one in self._tables(x, positions_B)))
        values = torch.ones_like(cis).expand(-1, self._kv_heads, -1)
        queries = (cis * self._shape.scaling).expand(-1, self._query_heads, -1)
        return torch.cat((queries, cis.expand(-1, self._kv_heads, -1), values), dim=1)

    def _tables(self, x: torch.Tensor, positions_B: torch.Tensor) -> list[torch.Tensor]:
        """Cosines and sines of the positions [B, D/2], rounded to the format of x, in at least
        float32. Looked up where they do not depend on what else is asked for."""
        if self.device.type != "cpu" or not self.can_be_recorded:
            return self._computed_tables(x, positions_B)
        needed = int(positions_B.max()) + 1
        if needed > self._known_positions:
            self._known_positions = max(needed, 2 * self._known_positions, _FEWEST_POSITIONS)
            every = torch.arange(self._known_positions)
            self._known_tables = self._computed_tables(x, every)
        return [table.index_select(0, positions_B) for table in self._known_tables]

    def _computed_tables(self, x: torch.Tensor, positions_B: torch.Tensor) -> list[torch.Tensor]:
        half = self._shape.head_dim // 2
        tables = self._rotary(x[None], positions_B[None])
        return [widened(table[0, :, :half]).contiguous() for table in tables]
