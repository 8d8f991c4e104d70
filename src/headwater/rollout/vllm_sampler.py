"""Sampling from vLLM servers, on the weights as they are now.

The same records as the in-process sampler gives: exact sampled ids with the emitted end token, and
log-probabilities of the distribution that was drawn from (temperature, filters, and no
probability for tokens beyond the tokenizer's own). Other random numbers: a sample's seed is its
key, so that it does not depend on what else is asked, but vLLM draws from it in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from headwater.config.compute import VLLM_TEMPERATURES
from headwater.errors import InputError, StageError
from headwater.rollout.sampler import SampleRequest, SamplerSettings
from headwater.rollout.vllm_client import Json
from headwater.rollout.vllm_servers import Servers
from headwater.rollout.vllm_weights import LiveWeights, Weights
from headwater.types import FinishReason, Rollout

#: vLLM's seeds are signed; what is left of a key still tells 2^63 samples apart.
_SEED_MASK = (1 << 63) - 1
#: Tokens of the first prompt that are scored on both sides after each push.
_CHECKED_TOKENS = 64
#: Mean difference in nats per token that rounding and other kernels explain, by number format,
#: for each nat of the mean (and one more): unlikely tokens differ more.
CHECK_TOLERANCE = {"float32": 0.002, "bfloat16": 0.05}


class Policy(Protocol):
    """The model that is sampled from, whose weights change.

    Called by the process that asks the servers, and by no other.
    """

    def version(self) -> int:
        """A number that changes with the weights, before any of them does."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as they are, not copies, under their names in a folder of safetensors."""

    def write(self, folder: Path) -> Path:
        """A folder of safetensors with the weights as they are: `folder`, or one that has them."""

    def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """Log-probabilities of a response at temperature 1, float32 [T]."""


@dataclass(slots=True)
class VLLMSampler:
    """Asks servers for rollouts; gives them the policy's weights whenever these have changed.

    dtype: of the servers' weights. scratch: where weights are written for servers that read them
    from a folder.
    """

    servers: Servers
    policy: Policy
    settings: SamplerSettings
    dtype: str
    scratch: Path
    _pushed: int | None = None
    _checked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError for settings that a server would silently change."""
        low, high = VLLM_TEMPERATURES
        temperature = self.settings.temperature
        if temperature and not low <= temperature <= high:
            raise InputError(
                f"temperature={temperature:g} with compute.rollouts: vllm, whose temperatures are "
                f"from {low:g} to {high:g}; choose one of these, or compute.rollouts: in_process"
            )

    def sample(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """One tuple of rollouts per request, all of the policy's present version."""
        self.push(requests)
        return self.ask(requests)

    def push(self, requests: Sequence[SampleRequest]) -> None:
        """Give the servers the policy's weights, if these have changed, before such requests."""
        if not requests:
            return
        version = self.policy.version()
        if version != self._pushed:
            self._checked = self._checked or requests[0].prompt_ids[-_CHECKED_TOKENS:]
            checked = partial(self._check_scores, version)
            self.servers.load(self._weights(version), version, checked)
            self._pushed = version

    def ask(self, requests: Sequence[SampleRequest]) -> list[tuple[Rollout, ...]]:
        """Rollouts of the weights pushed last, whatever has become of the policy's since."""
        if not requests:
            return []
        assert self._pushed is not None
        version = self._pushed
        self._check_lengths(requests)
        bodies = [self._body(r.prompt_ids, key) for r in requests for key in r.keys]
        answers = iter(self.servers.ask(bodies))
        self.servers.rest()
        return [
            tuple(self._rollout(r.prompt_ids, next(answers), version) for _ in r.keys)
            for r in requests
        ]

    def _weights(self, version: int) -> Weights:
        if self.servers.take_tensors:
            return LiveWeights(self.policy.tensors, self.policy.version, version)
        return self.policy.write(self.scratch)

    def _check_scores(self, version: int) -> None:
        """Score one fixed sequence on both sides; raises StageError where they differ.

        Only at the push itself: at a server's later restart the policy may be in training.
        """
        ids = self._checked
        if len(ids) < 2 or version == self._pushed:
            return
        ours = self.policy.logprobs(ids[:1], ids[1:])
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        answer = self.servers.ask([{"token_ids": list(ids), "sampling_params": params}])[0]
        positions = answer["prompt_logprobs"][1:]
        theirs = np.array(
            [at[str(token)]["logprob"] for at, token in zip(positions, ids[1:], strict=True)]
        )
        gap = float(np.abs(theirs - ours).mean())
        allowed = CHECK_TOLERANCE[self.dtype] * (1.0 + float(np.abs(ours).mean()))
        if not gap <= allowed:
            raise StageError(
                f"the vLLM server's log-probabilities differ by {gap:.3g} nats a token from ours "
                f"after weights were pushed, expected at most {allowed:.3g}; it "
                "computes another model: serve the folder that the stage "
                "trains, or use compute.rollouts: in_process"
            )

    def _check_lengths(self, requests: Sequence[SampleRequest]) -> None:
        limit = self.servers.info.max_model_len
        longest = max(len(request.prompt_ids) for request in requests)
        asked = longest + self.settings.max_new_tokens
        if asked > limit:
            raise StageError(
                f"a prompt of {longest} tokens and max_new_tokens={self.settings.max_new_tokens} "
                f"are {asked} tokens, and the vLLM server takes {limit}; raise "
                "compute.rollouts.max_model_len, or lower sampling.max_new_tokens"
            )

    def _body(self, prompt_ids: tuple[int, ...], key: int) -> Json:
        settings = self.settings
        params: dict[str, Any] = {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": key & _SEED_MASK,
            "logprobs": 0,
            "ignore_eos": True,  # the ends are ours to say
            "stop_token_ids": [] if settings.forbid_end else list(settings.end_ids),
            "top_p": settings.top_p,
            "top_k": settings.top_k or 0,
            "detokenize": False,
        }
        return {"token_ids": list(prompt_ids), "sampling_params": params}

    def _rollout(self, prompt_ids: tuple[int, ...], answer: Json, version: int) -> Rollout:
        (choice,) = answer["choices"]
        ids = tuple(choice["token_ids"])
        tokens = choice["logprobs"]["content"]
        assert [token["token_id"] for token in tokens] == list(ids)
        logprobs = np.array([token["logprob"] for token in tokens], dtype=np.float32)
        if self.settings.temperature == 0.0:  # the only token that could be drawn
            logprobs = np.zeros_like(logprobs)
        stopped = bool(ids) and ids[-1] in self.settings.end_ids
        return Rollout(
            prompt_ids=prompt_ids,
            response_ids=ids,
            sampler_logprobs=logprobs,
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            policy_version=version,
        )
