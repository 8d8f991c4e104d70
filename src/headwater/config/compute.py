"""Where and how a run computes. Nothing here changes what is computed, but for rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from headwater.config.base import Settings
from headwater.config.stages import _kind_shorthand, _tuple


class InProcess(Settings):
    """By the process that trains, with its own weights."""

    kind: Literal["in_process"] = "in_process"


class VLLM(Settings):
    """By vLLM servers: those at `urls`, or one that each stage starts for itself where none is
    given.

    python: the interpreter of the environment that vLLM is installed in; this one by default.
    """

    kind: Literal["vllm"] = "vllm"
    urls: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()
    python: str | None = None


Engine = Annotated[InProcess | VLLM, Field(discriminator="kind"), BeforeValidator(_kind_shorthand)]


class Compute(Settings):
    """Where and how it runs. `processes` independent stages at once, `threads` each.

    deterministic: on a GPU, only algorithms that give the same bits every time. ranks: processes
    (on a GPU machine, one GPU each) that share each stage: weights and optimiser state are
    sharded over them. retries: how often a stage whose process was lost is started again from
    its checkpoint; where it is not set, never, and three times on a Ray cluster.
    activation_checkpointing: the backward pass computes layers again instead of keeping what is
    inside them. cpu_offload: sharded weights and optimiser state lie in the host's memory.
    rollouts, scoring: who samples, and who scores with the teacher.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    processes: PositiveInt | None = None
    threads: PositiveInt | None = None
    deterministic: bool = False
    ranks: PositiveInt = 1
    retries: Annotated[int, Field(ge=0)] | None = None
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    rollouts: Engine = InProcess()
    scoring: Engine = InProcess()
