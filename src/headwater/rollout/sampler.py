"""Where rollouts come from: the protocol, and sampling inside this process.

One prefill per unique prompt, keys and values shared by its rollouts, exact sampled ids and
log-probabilities, a seed per sample that does not depend on what else is in the batch, and rows
that leave when they finish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from headwater import seeding
from headwater.engine.decoder import can_record, decoder_of
from headwater.engine.decoding import DecodeLayout
from headwater.engine.forward import head_weight
from headwater.engine.memory import is_out_of_memory, release_memory
from headwater.engine.packing import pack_prompts
from headwater.engine.recording import RecordedForward
from headwater.errors import StageError
from headwater.rollout.drawing import draw_tokens
from headwater.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Finished rows are dropped from the batch once they are this share of it.
_DROP_SHARE = 0.15
#: Prompt tokens that are prefilled at once.
_PREFILL_TOKENS = 16384
#: Rows that decode at once unless the caller says otherwise.
MAX_ROWS = 512


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Draw `len(keys)` responses to one prompt; keys are 64-bit seeds, one per response."""

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """temperature 0 takes the likeliest token; `end_ids` end a response and belong to it;
    `vocab_size` cuts padding tokens off; `forbid_end` keeps sampling to the limit (benchmarks);
    `top_p` and `top_k` keep the likeliest tokens alone (evaluation: they bias importance ratios).
    """

    temperature: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    vocab_size: int
    forbid_end: bool = False
    top_p: float = 1.0
    top_k: int | None = None


#: Told (rows at once from now on, rows before, what the allocator said) when memory ran out.
OnFewerRows = Callable[[int, int, str], None]
#: Told the ids that the first row in the batch has so far, each time one is drawn.
OnToken = Callable[[list[int]], None]


class Sampler(Protocol):
    """Anything that answers requests with rollouts, in order."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """One tuple of rollouts per request, as many as it has keys."""
        ...


class InProcessSampler:
    """Samples from a transformers model loaded with headwater's attention."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SamplerSettings,
        *,
        max_rows: int = MAX_ROWS,
        on_fewer_rows: OnFewerRows | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._max_rows = max_rows
        self._on_fewer_rows = on_fewer_rows
        self._on_token = on_token
        self._divides = False  # requests wider than max_rows, once memory ran out

    def sample(
        self, requests: Sequence[SampleRequest], recorded: RecordedForward | None = None
    ) -> list[tuple[Rollout, ...]]:
        """One tuple of rollouts per request.

        At most `max_rows` rows decode at once, or one request's if those are more. Requests that
        do not fit wait, and take the places of rows that finish. Where memory runs out the call
        is done again with half of the rows, then and later; raises StageError where a single row
        does not fit. recorded: where the forward pass is written down for training; it stays
        empty where that is impossible, would not fit, or memory ran out.
        """
        while requests:
            try:
                return self._sample(requests, recorded)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0] or type(error).__name__
            if recorded is not None:
                recorded.drop()
                recorded = None
            release_memory()
            self._halve([len(request.keys) for request in requests], said)
        return []

    def _sample(
        self, requests: Sequence[SampleRequest], recorded: RecordedForward | None
    ) -> list[tuple[Rollout, ...]]:
        parts = [part for request in requests for part in self._parts(request)]
        with torch.inference_mode():
            decoding = _Decoding(self._model, self._settings, parts, recorded)
            self._decode(decoding, deque(range(len(parts))))
        drawn = _as_rollouts(parts, decoding, self._settings.end_ids)
        if len(parts) == len(requests):
            return drawn
        rows = iter([rollout for part in drawn for rollout in part])
        return [tuple(islice(rows, len(request.keys))) for request in requests]

    def _parts(self, request: SampleRequest) -> list[SampleRequest]:
        """The request, or in pieces of `max_rows` rows where requests are divided."""
        size = self._max_rows if self._divides else max(1, len(request.keys))
        return [
            SampleRequest(request.prompt_ids, request.keys[start : start + size])
            for start in range(0, max(1, len(request.keys)), size)
        ]

    def _halve(self, widths: Sequence[int], said: str) -> None:
        """widths: rows of each request of the call that failed, often fewer than are allowed."""
        widest = 0 if self._divides else max(widths)
        at_once = min(sum(widths), max(self._max_rows, widest))
        if at_once <= 1:
            raise StageError(
                f"a single response does not fit into memory while it is sampled ({said}); lower "
                "sampling.max_new_tokens, use a smaller model or compute.precision=bfloat16, or "
                "lower compute.processes"
            )
        before, self._max_rows, self._divides = self._max_rows, at_once // 2, True
        if self._on_fewer_rows is not None:
            self._on_fewer_rows(self._max_rows, before, said)

    def _decode(self, decoding: _Decoding, waiting: deque[int]) -> None:
        while waiting or decoding.rows:
            entering: list[int] = []
            free = self._max_rows - decoding.rows
            while waiting and (
                decoding.width(waiting[0]) <= free or not (decoding.rows or entering)
            ):
                free -= decoding.width(waiting[0])
                entering.append(waiting.popleft())
            if entering:
                decoding.admit(entering)
            decoding.draw()
            if self._on_token is not None:
                self._on_token(decoding.first_ids())
            decoding.leave(at_once=self._max_rows // 8 if waiting else None)
            if decoding.rows:
                decoding.step()


class _Decoding:
    """The rows under way. Rows are numbered over all requests, in order."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SamplerSettings,
        requests: Sequence[SampleRequest],
        recorded: RecordedForward | None = None,
    ) -> None:
        self._settings, self._requests = settings, requests
        widths = [len(r.keys) for r in requests]
        if recorded is not None:
            prompts, most = [len(r.prompt_ids) for r in requests], settings.max_new_tokens
            if not (can_record(model) and recorded.begin(prompts, widths, most)):
                recorded = None
        self._recorded = recorded
        self._decoder = decoder_of(model, settings.vocab_size, recorded)
        head = head_weight(model)
        self._device, self._dtype = head.device, head.dtype
        keys = np.array([key for r in requests for key in r.keys], dtype=np.uint64)
        limit, count = settings.max_new_tokens, keys.shape[0]
        self._first_row = np.cumsum([0, *widths])
        self._uniforms = torch.from_numpy(seeding.uniforms(keys, 0, limit)).to(self._device)
        self._ends = torch.tensor(settings.end_ids, dtype=torch.long, device=self._device)
        self.ids_NT = torch.zeros(count, limit, dtype=torch.long, device=self._device)
        self.logprobs_NT = torch.zeros(count, limit, device=self._device)
        self.lengths_N = torch.full((count,), limit, dtype=torch.long, device=self._device)
        # of the rows in the batch: number, tokens drawn, position of the next, still alive
        self._row = torch.zeros(0, dtype=torch.long, device=self._device)
        self._drawn, self._position = self._row, self._row
        self._alive = self._row.bool()
        self._hidden = torch.zeros(0)
        self._token = self._row
        self._layout: DecodeLayout | None = None

    @property
    def rows(self) -> int:
        """Rows in the batch, finished ones that have not left included."""
        return int(self._row.shape[0])

    def first_ids(self) -> list[int]:
        """What the first row in the batch has drawn so far."""
        found: list[int] = self.ids_NT[self._row[0], : int(self._drawn[0])].tolist()
        return found

    def width(self, request: int) -> int:
        """Rows of a request."""
        return len(self._requests[request].keys)

    def admit(self, entering: Sequence[int]) -> None:
        """Prefill the prompts of these requests, once each, and let their rows in."""
        chunk: list[int] = []
        for request in entering:
            longest = max(len(self._requests[r].prompt_ids) for r in [*chunk, request])
            if chunk and longest * (len(chunk) + 1) > _PREFILL_TOKENS:
                self._prefill(chunk)
                chunk = []
            chunk.append(request)
        self._prefill(chunk)

    def _prefill(self, chunk: Sequence[int]) -> None:
        prompts = [self._requests[r].prompt_ids for r in chunk]
        widths = torch.tensor([self.width(r) for r in chunk], device=self._device)
        group = torch.arange(len(chunk), device=self._device).repeat_interleave(widths)
        ids, positions, layout, last = pack_prompts(prompts, dtype=self._dtype, device=self._device)
        if self._recorded is not None:
            self._recorded.expect_prompts(chunk, ids[0])
        states = self._decoder.prefill(ids[0], positions[0], layout)
        hidden = states.index_select(0, last).index_select(0, group)
        assert layout.capture is not None
        lengths = [len(p) for p in prompts]
        joined = DecodeLayout(layout.capture, lengths, group)
        rows = [torch.arange(int(self._first_row[r]), int(self._first_row[r + 1])) for r in chunk]
        row = torch.cat(rows).to(self._device)
        position = torch.tensor(lengths, device=self._device).index_select(0, group)
        if self._layout is None:
            self._layout, self._hidden = joined, hidden
            self._row, self._position = row, position
            self._drawn, self._alive = torch.zeros_like(row), torch.ones_like(row).bool()
            return
        self._layout.join(joined)
        self._hidden = torch.cat((self._hidden, hidden))
        self._row = torch.cat((self._row, row))
        self._position = torch.cat((self._position, position))
        self._drawn = torch.cat((self._drawn, torch.zeros_like(row)))
        self._alive = torch.cat((self._alive, torch.ones_like(row).bool()))

    def draw(self) -> None:
        """One token for every row, from the hidden states of the last step."""
        uniforms = self._uniforms[self._row, self._drawn]
        logits = self._decoder.logits(self._hidden)
        self._token, logprobs = draw_tokens(logits, uniforms, self._settings, self._ends)
        self.ids_NT[self._row, self._drawn] = self._token
        self.logprobs_NT[self._row, self._drawn] = logprobs.float()
        self._drawn = self._drawn + 1
        if not self._settings.forbid_end:
            ended = self._alive & torch.isin(self._token, self._ends)
            self.lengths_N[self._row[ended]] = self._drawn[ended]
            self._alive = self._alive & ~ended

    def leave(self, at_once: int | None) -> None:
        """Drop finished rows once they are many: a share of the batch, or `at_once` rows.

        A row that has reached the limit never stays.
        """
        full = self._drawn == self._settings.max_new_tokens
        self._alive = self._alive & ~full
        left = int(self._alive.sum())
        gone = self.rows - left
        many = gone >= _DROP_SHARE * self.rows or (at_once is not None and gone >= at_once)
        if gone and (many or bool(full.any())):
            kept = self._alive.nonzero()[:, 0]
            if not left:
                self._layout = None
            elif self._layout is not None:
                self._layout.keep(kept)
            self._row, self._drawn = self._row[kept], self._drawn[kept]
            self._position, self._token = self._position[kept], self._token[kept]
            self._alive = self._alive[kept]

    def step(self) -> None:
        """Feed the drawn tokens; their hidden states are what is drawn from next."""
        assert self._layout is not None
        if self._recorded is not None:
            self._recorded.expect_tokens(self._row, self._drawn - 1, self._token)
        self._hidden = self._decoder.step(self._token, self._position, self._layout)
        self._layout.advance()
        self._position = self._position + 1


def _as_rollouts(
    requests: Sequence[SampleRequest], decoding: _Decoding, end_ids: Sequence[int]
) -> list[tuple[Rollout, ...]]:
    ids_NT, logprobs_NT = decoding.ids_NT.cpu().numpy(), decoding.logprobs_NT.cpu().numpy()
    lengths = decoding.lengths_N.tolist()
    groups, at = [], 0
    for request in requests:
        rollouts = []
        for row in range(at, at + len(request.keys)):
            response = tuple(ids_NT[row, : lengths[row]].tolist())
            stopped = bool(response) and response[-1] in end_ids
            rollouts.append(
                Rollout(
                    prompt_ids=request.prompt_ids,
                    response_ids=response,
                    sampler_logprobs=logprobs_NT[row, : lengths[row]].copy(),
                    finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
                )
            )
        groups.append(tuple(rollouts))
        at += len(request.keys)
    return groups
