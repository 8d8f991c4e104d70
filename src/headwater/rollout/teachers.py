"""A teacher as distillation asks it: a frozen model, or behind vLLM, with the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from headwater.config.compute import VLLM, Compute
from headwater.config.distillation import FullVocabulary, SampledToken, Targets, TopK
from headwater.engine.packing import TokenBatch
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.errors import InputError
from headwater.models.config_file import read_config
from headwater.models.size import hidden_size, parameter_count
from headwater.rollout.engines import Serving, make_vllm_teacher
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.vllm_scoring import VLLMTeacher
from headwater.types import Rollout, SampledTargets, TeacherTargets, TopKTargets

#: A server's targets, a rollout each.
ServedRows = list[TopKTargets] | list[SampledTargets]


def most_logprobs(wanted: Targets | None) -> int:
    """How many tokens these targets ask for at one place."""
    return wanted.k if isinstance(wanted, TopK) else 1


class Teacher(Protocol):
    """What a teacher thinks of the tokens of rollouts."""

    @property
    def parameters(self) -> int:
        """All of its parameters."""

    def ask(self, rollouts: Sequence[Rollout]) -> ServedRows | None:
        """Score rollouts ahead, where that is done elsewhere: by the main rank, in any thread."""

    def prepare(self, rows: ServedRows | None) -> None:
        """What `ask` said of the rollouts that `targets` will be asked about; row n is the n-th."""

    def targets(self, batch: TokenBatch) -> TeacherTargets:
        """What it thinks of each target of a micro-batch of those rows, in packing order."""


def make_teacher(
    compute: Compute,
    serving: Serving,
    vocab_size: int,
    wanted: Targets,
    temperature: float = 1.0,
    local: FrozenModel | None = None,
    is_main: bool = True,
) -> Teacher:
    """The teacher in `serving.folder` with the engine of `compute.scoring`.

    local: the same model where it is loaded already. is_main: whether this process may ask servers,
    for the other ranks too. Raises InputError for what no server gives.
    """
    if not isinstance(compute.scoring, VLLM):
        if local is None:
            device = resolve_device(compute)
            dtype = resolve_dtype(compute, device, hidden_size(serving.folder))
            local = FrozenModel.load(serving.folder, device, dtype, vocab_size)
        return LocalTeacher(local, wanted, temperature)
    if isinstance(wanted, FullVocabulary):
        raise InputError(
            "targets: full with compute.scoring: vllm, which gives no whole distribution; set "
            "targets: {kind: top_k, k: 64}, or compute.scoring: in_process"
        )
    if temperature != 1.0:
        raise InputError(
            f"teacher_temperature={temperature:g} with compute.scoring: vllm, which scores at "
            "temperature 1 only; set teacher_temperature: 1.0, or compute.scoring: in_process"
        )
    served = make_vllm_teacher(compute, serving, vocab_size) if is_main else None
    return ServedTeacher(served, wanted, parameter_count(read_config(serving.folder)))


@dataclass(frozen=True, slots=True)
class LocalTeacher:
    """A frozen model of this process, asked a micro-batch at a time."""

    model: FrozenModel
    wanted: Targets
    temperature: float

    @property
    def parameters(self) -> int:
        """All of its parameters."""
        return self.model.parameters

    def ask(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing: a micro-batch has all that it needs."""

    def prepare(self, rows: ServedRows | None) -> None:
        """Nothing."""

    def targets(self, batch: TokenBatch) -> TeacherTargets:
        """What it thinks of each target of a micro-batch."""
        if isinstance(self.wanted, TopK):
            return self.model.top_k(batch, self.wanted.k, self.temperature)
        if isinstance(self.wanted, SampledToken):
            return SampledTargets(self.model.logprobs(batch, self.temperature))
        return self.model.targets(batch)


@dataclass(slots=True)
class ServedTeacher:
    """A teacher behind servers, asked about all rollouts of a step at once."""

    served: VLLMTeacher | None
    wanted: TopK | SampledToken
    parameters: int
    _rows: ServedRows = field(default_factory=list)

    def ask(self, rollouts: Sequence[Rollout]) -> ServedRows:
        """The teacher's targets of each rollout."""
        assert self.served is not None
        pairs = [(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
        if isinstance(self.wanted, TopK):
            return self.served.top_k(pairs, self.wanted.k)
        return self.served.sampled(pairs)

    def prepare(self, rows: ServedRows | None) -> None:
        """Keep what `ask` returned, until the next call."""
        assert rows is not None
        self._rows = rows

    def targets(self, batch: TokenBatch) -> TeacherTargets:
        """What the servers said of each target of a micro-batch of those rollouts."""
        device = batch.target_ids_T.device
        rows = [self._rows[row] for row in batch.rows]
        top = [row for row in rows if isinstance(row, TopKTargets)]
        if top:
            ids = torch.cat([row.ids_TK for row in top]).to(device)
            return TopKTargets(ids, torch.cat([row.logprobs_TK for row in top]).to(device))
        sampled = [row for row in rows if isinstance(row, SampledTargets)]
        return SampledTargets(torch.cat([row.logprobs_T for row in sampled]).to(device))
