"""A teacher behind vLLM servers: what it thinks of each token of given responses.

A server scores the tokens of a prompt, so a response is sent as the end of one. It gives the
likeliest tokens and the one that is there, at temperature 1; never a whole distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwater.errors import StageError
from headwater.rollout.vllm_client import Json
from headwater.rollout.vllm_servers import Servers
from headwater.types import SampledTargets, TopKTargets

#: A prompt and a response to it.
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class VLLMTeacher:
    """A frozen model that servers have; `folder` has its safetensors."""

    servers: Servers
    folder: Path
    vocab_size: int

    def load(self) -> VLLMTeacher:
        """Let the servers answer with the teacher's weights."""
        self.servers.load(self.folder, 0)
        return self

    def top_k(self, pairs: Sequence[Pair], k: int) -> list[TopKTargets]:
        """The k likeliest tokens at every token of each response, likeliest first: [t, k] each.

        Raises StageError for a pair that is longer than the servers take.
        """
        k = min(k, self.vocab_size)
        found = []
        for (prompt, response), positions in zip(pairs, self._scores(pairs, k), strict=True):
            ranked = [_likeliest(at, k) for at in positions[len(prompt) :]]
            assert len(ranked) == len(response)
            ids = torch.tensor([[token for token, _ in at] for at in ranked], dtype=torch.long)
            logprobs = torch.tensor([[value for _, value in at] for at in ranked])
            found.append(TopKTargets(ids.view(-1, k), logprobs.float().view(-1, k)))
        return found

    def sampled(self, pairs: Sequence[Pair]) -> list[SampledTargets]:
        """The log-probability of every token of each response, float32 [t] each."""
        found = []
        for (prompt, response), positions in zip(pairs, self._scores(pairs, 0), strict=True):
            values = [
                at[str(token)]["logprob"]
                for at, token in zip(positions[len(prompt) :], response, strict=True)
            ]
            found.append(SampledTargets(torch.tensor(values, dtype=torch.float32)))
        return found

    def _scores(self, pairs: Sequence[Pair], k: int) -> list[list[Any]]:
        """Entry i of a pair's list: what could have stood in place of its token i."""
        limit = self.servers.info.max_model_len
        longest = max((len(prompt) + len(response) for prompt, response in pairs), default=0)
        if longest >= limit:
            raise StageError(
                f"a prompt and response of {longest} tokens together are to be scored, and the "
                f"vLLM server takes {limit - 1}; raise compute.scoring.max_model_len, or lower "
                "sampling.max_new_tokens"
            )
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, "detokenize": False}
        bodies: list[Json] = [
            {"token_ids": [*prompt, *response], "sampling_params": params}
            for prompt, response in pairs
        ]
        answers = self.servers.ask(bodies)
        self.servers.rest()
        return [answer["prompt_logprobs"] for answer in answers]


def _likeliest(at: Mapping[str, Mapping[str, Any]], k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens and their log-probabilities. The one that is there comes on top."""
    ranked = sorted(at.items(), key=lambda item: (-item[1]["logprob"], item[1]["rank"]))
    return [(int(token), float(value["logprob"])) for token, value in ranked[:k]]
