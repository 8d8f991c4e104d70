"""The records that pass between modules, and the legend of shape suffixes.

P prompts; G rollouts per prompt; N = P * G rollouts; T next-token positions; V vocabulary;
K support of a truncated distribution; H hidden size; Q evaluation problems; A attempts;
S seeds. Position t always concerns predicting `target_ids[t]`. Log-probabilities are nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


class Verdict(StrEnum):
    """What a verifier says of one completion; only CORRECT earns reward."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"


class FinishReason(StrEnum):
    """Why a rollout ended: it emitted an end token, or ran into the length limit."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt to answer. The gold answer is not here: it lives in the label vault alone.

    prompt: what the user says last; before: (role, text) of the messages before it, a system's or
    those of a conversation.
    """

    id: str
    prompt: str
    source: str
    level: int | None = None
    subject: str | None = None
    before: tuple[tuple[str, str], ...] = ()

    @property
    def whole_text(self) -> str:
        """Every message, one after another."""
        return "\n\n".join([*(text for _, text in self.before), self.prompt])


@dataclass(frozen=True, slots=True)
class Label:
    """What the vault keeps of a problem: the gold answer and, where known, a worked solution.

    row: the whole record it was read from, as JSON can hold it, where a reward function or a
    library's scoring reads more than the answer.
    """

    problem_id: str
    answer: str = field(repr=False)
    solution: str | None = field(default=None, repr=False)
    row: Mapping[str, Any] | None = field(default=None, repr=False)


class Completion(str):
    """A response as text, with the tokens that it was decoded from, for whoever grades both."""

    token_ids: tuple[int, ...]

    def __new__(cls, text: str, token_ids: tuple[int, ...] = ()) -> Completion:
        made = super().__new__(cls, text)
        made.token_ids = token_ids
        return made


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. `response_ids` includes the emitted end token, if any."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs: np.ndarray  # float32 [len(response_ids)], nats, at the sampling temperature
    finish_reason: FinishReason
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one problem."""

    problem_id: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class FullTargets:
    """Teacher's whole next-token distribution, as final hidden states and the output head.

    hidden_TH: [T, H]; head_VH: [V, H]; logits exist a chunk at a time only.
    """

    hidden_TH: torch.Tensor
    head_VH: torch.Tensor


@dataclass(frozen=True, slots=True)
class TopKTargets:
    """Teacher's K most likely tokens; the rest of the mass is 1 - sum(exp(logprobs))."""

    ids_TK: torch.Tensor  # int64
    logprobs_TK: torch.Tensor  # float32, nats


@dataclass(frozen=True, slots=True)
class SampledTargets:
    """Teacher's log-probability of the token that was sampled."""

    logprobs_T: torch.Tensor  # float32, nats


TeacherTargets = FullTargets | TopKTargets | SampledTargets


@dataclass(frozen=True, slots=True)
class LossSums:
    """A loss as a sum and its count; the engine alone divides, by the global denominator.

    metrics maps a name to (sum, count), both detached.
    """

    loss_sum: torch.Tensor
    denominator: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something a stage published: a model folder, rollouts, an evaluation."""

    kind: str
    fingerprint: str
    path: Path
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptTable:
    """Verdicts of an evaluation. `correct` bool [S, Q, A]; `response_tokens` int [S, Q, A].

    votes: for each attempt the number of the first one at its problem that answered the same,
    -1 for no answer; None where the evaluation is older than votes.
    """

    problem_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    verdicts: np.ndarray  # object/str array [S, Q, A] of Verdict values
    response_tokens: np.ndarray  # int32 [S, Q, A]
    truncated: np.ndarray  # bool [S, Q, A]
    votes: np.ndarray | None = None  # int32 [S, Q, A]

    @property
    def correct(self) -> np.ndarray:
        """bool [S, Q, A]"""
        return self.verdicts == Verdict.CORRECT.value
