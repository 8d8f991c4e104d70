"""Who samples and who scores: our own sampler, vLLM servers or vLLM here, as `compute` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from headwater.config.compute import VLLM, Compute
from headwater.engine.forward import head_weight
from headwater.engine.packing import PackedGroup, pack
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.models.saving import once_each, save_weights
from headwater.models.size import hidden_size
from headwater.rollout.sampler import (
    MAX_ROWS,
    InProcessSampler,
    OnFewerRows,
    Sampler,
    SamplerSettings,
)
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.vllm_process import ServerSettings
from headwater.rollout.vllm_sampler import VLLMSampler
from headwater.rollout.vllm_scoring import VLLMTeacher
from headwater.rollout.vllm_servers import Servers, StaleWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _never_changes() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Serving:
    """What servers need to know of a model of a stage.

    folder: what the model was loaded from. scratch: the stage's folder for logs and weights under
    way. closing: ends the servers with the stage. version: a number that changes with the weights,
    before any of them does. max_logprobs: the most tokens that are asked for at one place.
    """

    folder: Path
    scratch: Path
    closing: ExitStack
    version: Callable[[], int] = _never_changes
    max_logprobs: int = 1
    servers: dict[VLLM, Servers] = field(default_factory=dict)


def make_sampler(
    compute: Compute,
    model: PreTrainedModel,
    settings: SamplerSettings,
    serving: Serving | None = None,
    *,
    max_rows: int = MAX_ROWS,
    on_fewer_rows: OnFewerRows | None = None,
) -> Sampler:
    """The sampler of `compute.rollouts` for a model of this process, which stays the model's.

    serving: needed where servers sample. max_rows, on_fewer_rows: of the in-process sampler.
    """
    engine = compute.rollouts
    if not isinstance(engine, VLLM):
        return InProcessSampler(model, settings, max_rows=max_rows, on_fewer_rows=on_fewer_rows)
    assert serving is not None
    dtype = _dtype_name(compute, serving.folder)
    scratch = serving.scratch / "vllm-rollouts"
    servers = _servers(compute, engine, serving, dtype, scratch, settings.vocab_size)
    policy = _ModelPolicy(model, settings.vocab_size, serving)
    return VLLMSampler(servers, policy, settings, dtype, scratch)


def make_vllm_teacher(compute: Compute, serving: Serving, vocab_size: int) -> VLLMTeacher:
    """A teacher behind the servers of `compute.scoring`, with the weights of `serving.folder`."""
    engine = compute.scoring
    assert isinstance(engine, VLLM)
    name = _dtype_name(compute, serving.folder)
    scratch = serving.scratch / "vllm-scoring"
    servers = _servers(compute, engine, serving, name, scratch, vocab_size)
    return VLLMTeacher(servers, serving.folder, vocab_size).load()


def _dtype_name(compute: Compute, folder: Path) -> str:
    """The format a model computes in, as its servers are told."""
    dtype = resolve_dtype(compute, resolve_device(compute), hidden_size(folder))
    return str(dtype).removeprefix("torch.")


def _servers(
    compute: Compute, engine: VLLM, serving: Serving, dtype: str, scratch: Path, vocab_size: int
) -> Servers:
    """The model's servers with this engine: the same for a sampler and a teacher of one model."""
    if engine in serving.servers:
        return serving.servers[engine]
    settings = ServerSettings(
        model=serving.folder,
        log=scratch / "server.log",
        dtype=dtype,
        on_cpu=resolve_device(compute).type == "cpu",
        python=engine.python,
        threads=torch.get_num_threads(),
        max_model_len=engine.max_model_len,
        max_logprobs=serving.max_logprobs,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_cache_gib=engine.cpu_cache_gib,
        sleeps=engine.sleeps,
        startup_seconds=engine.startup_seconds,
        extra_args=engine.extra_args,
    )
    servers = serving.servers[engine] = Servers(engine, settings, vocab_size)
    serving.closing.callback(servers.close)
    return servers


@dataclass(frozen=True, slots=True)
class _ModelPolicy:
    """A model of this process, as `vllm_sampler.Policy` wants it."""

    model: PreTrainedModel
    vocab_size: int
    serving: Serving

    def version(self) -> int:
        return self.serving.version()

    def _state(self) -> Mapping[str, torch.Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises StaleWeights where ranks hold parts of them: after the push, until the next."""
        state = self._state()
        if any(isinstance(tensor, DTensor) for tensor in state.values()):
            raise StaleWeights(
                "vLLM needs weights again (it was started again, or answered with others) that lie "
                "in parts on the ranks by now: run again, which continues from the last "
                "checkpoint, or choose transfer=folder, where they are kept"
            )
        return iter(once_each(state).items())

    def write(self, folder: Path) -> Path:
        save_weights(self._state(), folder / "weights" / "model.safetensors")
        return folder / "weights"

    def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        head = head_weight(self.model)
        group = PackedGroup(tuple(prompt_ids), (tuple(response_ids),), (0,))
        batch = pack([group], dtype=head.dtype, device=head.device)
        found = FrozenModel(self.model, self.vocab_size, 0).logprobs(batch)
        return found.cpu().numpy()
