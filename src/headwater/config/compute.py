"""Where and how a run computes. Nothing here changes what is computed, but for rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from headwater.config.addresses import KeyVariable, Url, is_here
from headwater.config.base import Settings
from headwater.config.distillation import _kind_shorthand, _tuple
from headwater.config.evaluation import EvaluationSampling
from headwater.config.stages import MixedStage, OPDStage, Sampling, WarmupStage

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe

#: A server's arguments that what headwater believes of its answers rests on.
_OURS = frozenset(
    {
        "--model",
        "--host",
        "--port",
        "--uds",
        "--dtype",
        "--logprobs-mode",
        "--max-logprobs",
        "--generation-config",
        "--worker-extension-cls",
        "--middleware",
        "--api-key",
        "--tokens-only",
    }
)
#: Settings that mean nothing to vLLM in this process.
_OF_SERVERS = (
    "urls",
    "key_variable",
    "python",
    "transfer",
    "extra_args",
    "request_seconds",
    "startup_seconds",
)
#: Kinds of stages that draw responses, and those that a teacher scores some for.
_SAMPLES = frozenset({"grpo", "opd", "mixed", "teacher_rollouts", "evaluate", "probe"})
_SCORES = frozenset({"opd", "mixed", "teacher_rollouts"})
#: vLLM refuses a higher temperature, and silently raises a lower one above 0.
VLLM_TEMPERATURES = (0.01, 2.0)


class InProcess(Settings):
    """By the process that trains, with its own weights."""

    kind: Literal["in_process"] = "in_process"


class VLLM(Settings):
    """By vLLM servers: those at `urls`, or one that each stage starts for itself where none is
    given. Or by vLLM in the process that trains, where that is asked for.

    in_process: no server, but vLLM's engine in this process. python: the interpreter of the
    environment that vLLM is installed in; this one by default. key_variable: the environment
    variable with the key of the servers at `urls`; a server of a stage's own has one that is made
    for it. transfer: how weights get to servers: as a folder that they read; by a broadcast of
    torch.distributed (NCCL between GPUs, gloo between CPUs); or through memory of one GPU, or one
    machine, that both sides map. requests_in_flight: asked of each server at once. request_seconds,
    startup_seconds: how long an answer and a start may take. max_model_len: tokens of prompt and
    response together; the model's own by default. gpu_memory_utilization: share of a device's
    memory; on a CPU cpu_cache_gib counts instead. sleeps: between rollouts its weights and cache
    leave the device's memory, for a trainer on the same device. extra_args: more of the server's
    own command line.
    """

    kind: Literal["vllm"] = "vllm"
    in_process: bool = False
    urls: Annotated[tuple[Url, ...], BeforeValidator(_tuple)] = ()
    key_variable: KeyVariable = "VLLM_API_KEY"
    python: str | None = None
    transfer: Literal["folder", "broadcast", "ipc"] = "folder"
    requests_in_flight: Annotated[int, Field(ge=1, le=4096)] = 128
    request_seconds: PositiveFloat = 1800.0
    startup_seconds: PositiveFloat = 600.0
    max_model_len: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    cpu_cache_gib: PositiveInt = 1
    sleeps: bool = False
    extra_args: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Self:
        if self.in_process:
            self._refuse_servers()
        if self.urls and self.extra_args:
            raise ValueError(
                f"extra_args={list(self.extra_args)} with urls: expected servers that are started "
                "here; give the arguments to the servers themselves, or remove urls"
            )
        far = [url for url in self.urls if not is_here(url)] if self.transfer == "ipc" else []
        if far:
            raise ValueError(
                f"transfer=ipc with {far[0]}: expected servers of this machine (localhost), since "
                "both sides map the same memory; use transfer=broadcast, or a folder that both see"
            )
        names = {argument.split("=")[0] for argument in self.extra_args}
        ours = sorted(names & _OURS)
        if ours:
            raise ValueError(
                f"extra_args={ours}: these are set for every server, because answers rest on "
                "them; remove them"
            )
        return self

    def _refuse_servers(self) -> None:
        """Raises ValueError for what is said to servers alone."""
        fields = type(self).model_fields
        said = [name for name in _OF_SERVERS if getattr(self, name) != fields[name].default]
        if said:
            raise ValueError(
                f"{', '.join(said)} with in_process=true: expected settings of vLLM's engine in "
                "this process, which is no server and has its own interpreter; remove "
                f"{'it' if len(said) == 1 else 'them'}, or in_process"
            )


def is_served(engine: InProcess | VLLM) -> bool:
    """Whether another process samples or scores."""
    return isinstance(engine, VLLM) and not engine.in_process


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

    @property
    def engines_here(self) -> tuple[VLLM, ...]:
        """vLLM's engines in the process that trains."""
        both = (self.rollouts, self.scoring)
        return tuple(one for one in both if isinstance(one, VLLM) and one.in_process)

    def identity(self, kind: str) -> list[str]:
        """What of it shows in the numbers of a stage of this kind, for the stage's fingerprint.

        Where a stage runs does not; how numbers are rounded does, and which random numbers draw
        its samples: a server's are not ours.
        """
        found: list[str] = [self.device, self.precision]
        if self.rollouts.kind != "in_process" and kind in _SAMPLES:
            found.append(f"rollouts={self.rollouts.kind}")
        if self.scoring.kind != "in_process" and kind in _SCORES:
            found.append(f"scoring={self.scoring.kind}")
        return found


def engine_problems(recipe: Recipe) -> list[str]:
    """What of a recipe the engines that it names cannot do, a line each."""
    compute = recipe.compute
    return [
        *_offload_problems(compute),
        *_sharing_problems(compute),
        *_in_process_problems(compute),
        *_temperature_problems(recipe),
        *_scoring_problems(recipe),
    ]


def _offload_problems(compute: Compute) -> list[str]:
    """Only what is sharded over GPUs can lie in the host's memory instead."""
    if not compute.cpu_offload:
        return []
    if compute.device == "cpu":
        return [
            "compute.cpu_offload=true with compute.device=cpu: expected GPUs, whose memory it "
            "spares; remove cpu_offload, or set compute.device: cuda"
        ]
    if compute.ranks == 1:
        return [
            "compute.cpu_offload=true with compute.ranks=1: expected ranks that weights are "
            "sharded over, because only a rank's share is kept in the host's memory; set "
            "compute.ranks >= 2, or remove cpu_offload"
        ]
    return []


def _sharing_problems(compute: Compute) -> list[str]:
    """A server has one model's weights at a time, so one stage asks it, for one model."""
    rollouts, scoring = (
        set(engine.urls) if isinstance(engine, VLLM) else set()
        for engine in (compute.rollouts, compute.scoring)
    )
    found = []
    if (rollouts or scoring) and compute.processes != 1:
        found.append(
            f"compute.processes={compute.processes or 'auto'} with urls of vLLM servers: stages "
            "that run at once would push their weights to the same servers; set "
            "compute.processes: 1, or remove urls"
        )
    if both := sorted(rollouts & scoring):
        found.append(
            f"{both[0]} is in the urls of compute.rollouts and compute.scoring: expected servers "
            "of their own, because student and teacher are two models; name another, or remove "
            "urls from one of the two"
        )
    return found


def _in_process_problems(compute: Compute) -> list[str]:
    """vLLM in a process makes a process group of its own there, and ranks have theirs."""
    engines = {"rollouts": compute.rollouts, "scoring": compute.scoring}
    return [
        f"compute.ranks={compute.ranks} with compute.{name}.in_process=true: expected one process "
        "to a stage, because vLLM's engine and ranks each need a torch.distributed group of their "
        f"own; set compute.ranks: 1, or remove compute.{name}.in_process and let each stage start "
        "a server"
        for name, engine in engines.items()
        if compute.ranks > 1 and isinstance(engine, VLLM) and engine.in_process
    ]


def _temperature_problems(recipe: Recipe) -> list[str]:
    if recipe.compute.rollouts.kind != "vllm":
        return []
    low, high = VLLM_TEMPERATURES
    asked: dict[str, Sampling | None] = {
        "sampling": recipe.sampling,
        "evaluation.sampling": recipe.evaluation.sampling,
        "diagnostics.sampling": recipe.diagnostics.sampling,
    }
    for where, stage in _stages(recipe):
        asked[f"{where}.sampling"] = getattr(stage, "sampling", None)
    return [
        f"{where}.temperature={sampling.temperature:g} with compute.rollouts: vllm, whose "
        f"temperatures are from {low:g} to {high:g}; choose one of these, or compute.rollouts: "
        "in_process"
        for where, sampling in asked.items()
        if sampling is not None
        and not low <= sampling.temperature <= high
        and not (isinstance(sampling, EvaluationSampling) and sampling.temperature == 0.0)
    ]


def _scoring_problems(recipe: Recipe) -> list[str]:
    if recipe.compute.scoring.kind != "vllm":
        return []
    found = []
    for where, stage in _stages(recipe):
        if not isinstance(stage, OPDStage | MixedStage | WarmupStage):
            continue
        if stage.targets.kind == "full":
            found.append(
                f"{where}.targets: full with compute.scoring: vllm, which gives no whole "
                "distribution; set targets: {kind: top_k, k: 64}, or compute.scoring: in_process"
            )
        elif stage.teacher_temperature != 1.0:
            found.append(
                f"{where}.teacher_temperature={stage.teacher_temperature:g} with compute.scoring: "
                "vllm, which scores prompts at temperature 1 only; set teacher_temperature: 1.0, "
                "or compute.scoring: in_process"
            )
    return found + [
        f"arms.{name}.teachers with compute.scoring: vllm, whose servers hold one teacher; "
        f"expected one for {kind}: set compute.scoring: in_process, or learn from several by "
        "warmup alone"
        for name, arm in recipe.arms.items()
        for kind in dict.fromkeys(item.kind for item in arm.student or () if arm.teachers)
        if kind in ("opd", "mixed")
    ]


def _stages(recipe: Recipe) -> list[tuple[str, object]]:
    """Every stage of an arm with its settings, by where the recipe has it."""
    found: list[tuple[str, object]] = []
    for name, arm in recipe.arms.items():
        for role, (_, chain) in arm.models.items():
            for index, item in enumerate(chain):
                found.append((f"arms.{name}.{role}[{index}].{item.kind}", recipe.stage(item)))
    return found
