"""Where rollouts come from: the protocol, and sampling inside this process.

One prefill per unique prompt, keys and values shared by its rollouts, exact sampled ids and
log-probabilities, a seed per sample that does not depend on what else is in the batch, and rows
that leave when they finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from headwater import seeding
from headwater.engine.attention import DecodeLayout
from headwater.engine.forward import head_weight, hidden_of_step
from headwater.engine.packing import pack_prompts
from headwater.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Finished rows are dropped from the batch once they are this share of it.
_DROP_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Draw `len(keys)` responses to one prompt; keys are 64-bit seeds, one per response."""

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """temperature > 0; `end_ids` end a response and belong to it; `vocab_size` cuts padding
    tokens off; `forbid_end` keeps sampling to the limit (benchmarks)."""

    temperature: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    vocab_size: int
    forbid_end: bool = False


class Sampler(Protocol):
    """Anything that answers requests with rollouts, in order."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """One tuple of rollouts per request, as many as it has keys."""
        ...


class InProcessSampler:
    """Samples from a transformers model loaded with headwater's attention."""

    def __init__(
        self, model: PreTrainedModel, settings: SamplerSettings, *, max_rows: int = 512
    ) -> None:
        self._model = model
        self._settings = settings
        self._max_rows = max_rows

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """One tuple of rollouts per request; at most `max_rows` rows decode at once."""
        done: list[tuple[Rollout, ...]] = []
        batch: list[SampleRequest] = []
        rows = 0
        for request in requests:
            if batch and rows + len(request.keys) > self._max_rows:
                done += self._sample_batch(batch)
                batch, rows = [], 0
            batch.append(request)
            rows += len(request.keys)
        if batch:
            done += self._sample_batch(batch)
        return done

    def _sample_batch(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        with torch.inference_mode():
            ids_BT, logprobs_BT, lengths_B = self._decode(requests)
        return _as_rollouts(requests, ids_BT, logprobs_BT, lengths_B, self._settings.end_ids)

    def _decode(
        self, requests: Sequence[SampleRequest]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampled ids [B, T], log-probabilities [B, T] and lengths [B] of all rows."""
        settings, model = self._settings, self._model
        device = next(model.parameters()).device
        head = head_weight(model, settings.vocab_size)
        keys = np.array([key for r in requests for key in r.keys], dtype=np.uint64)
        group = torch.tensor(
            [g for g, r in enumerate(requests) for _ in r.keys], dtype=torch.long, device=device
        )
        prompt_lengths = [len(r.prompt_ids) for r in requests]
        ids, positions, layout, last = pack_prompts(
            [r.prompt_ids for r in requests], dtype=head.dtype, device=device
        )
        body = model.get_decoder()
        states = body(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)
        hidden = states.last_hidden_state[0].index_select(0, last).index_select(0, group)
        assert layout.capture is not None
        decode = DecodeLayout(layout.capture, prompt_lengths, group)

        rows, limit = keys.shape[0], settings.max_new_tokens
        out_ids = torch.zeros(rows, limit, dtype=torch.long, device=device)
        out_logprobs = torch.zeros(rows, limit, dtype=torch.float32, device=device)
        lengths = torch.full((rows,), limit, dtype=torch.long, device=device)
        uniforms = torch.from_numpy(seeding.uniforms(keys, 0, limit)).to(device)
        ends = torch.tensor(settings.end_ids, dtype=torch.long, device=device)
        position = torch.tensor(prompt_lengths, device=device).index_select(0, group)
        row = torch.arange(rows, device=device)
        active = torch.ones(rows, dtype=torch.bool, device=device)
        for t in range(limit):
            token, logprob = self._draw(hidden, head, uniforms[row, t], ends)
            out_ids[row, t] = token
            out_logprobs[row, t] = logprob
            if not settings.forbid_end:
                ended = active & torch.isin(token, ends)
                lengths[row[ended]] = t + 1
                active = active & ~ended
                left = int(active.sum())
                if left == 0:
                    break
                if left <= (1.0 - _DROP_SHARE) * row.shape[0]:
                    kept = active.nonzero()[:, 0]
                    decode.keep(kept)
                    token, position, row = token[kept], position[kept], row[kept]
                    active = active[kept]
            if t + 1 == limit:
                break
            decode.begin_step()
            hidden = hidden_of_step(model, token, position, decode)
            decode.end_step()
            position = position + 1
        return out_ids.cpu().numpy(), out_logprobs.cpu().numpy(), lengths.cpu().numpy()

    def _draw(
        self, hidden_BH: torch.Tensor, head_VH: torch.Tensor, u_B: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse-CDF draw: the first token whose cumulative probability exceeds u."""
        logits = (hidden_BH @ head_VH.T).float()
        if self._settings.temperature != 1.0:
            logits = logits / self._settings.temperature
        if self._settings.forbid_end:
            logits[:, ends] = -torch.inf
        logprobs = torch.log_softmax(logits, dim=-1)
        cumulative = logprobs.exp().cumsum(-1)
        total = cumulative[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total
        threshold = torch.minimum(u_B[:, None] * total, below)
        token = torch.searchsorted(cumulative, threshold, right=True)
        token = token.clamp_max(head_VH.shape[0] - 1)  # reached by logits that are not numbers only
        return token[:, 0], logprobs.gather(-1, token)[:, 0]


def _as_rollouts(
    requests: Sequence[SampleRequest],
    ids_BT: np.ndarray,
    logprobs_BT: np.ndarray,
    lengths_B: np.ndarray,
    end_ids: Sequence[int],
) -> list[tuple[Rollout, ...]]:
    groups, at = [], 0
    for request in requests:
        rollouts = []
        for _ in request.keys:
            length = int(lengths_B[at])
            response = tuple(int(i) for i in ids_BT[at, :length])
            stopped = bool(response) and response[-1] in end_ids
            rollouts.append(
                Rollout(
                    prompt_ids=request.prompt_ids,
                    response_ids=response,
                    sampler_logprobs=logprobs_BT[at, :length].copy(),
                    finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
                )
            )
            at += 1
        groups.append(tuple(rollouts))
    return groups
