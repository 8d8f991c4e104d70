"""The recipe: one YAML file that says task, models, pools, stages, arms and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from headwater.config.arms import Arm, Chain, ChainItem, Name
from headwater.config.base import Settings
from headwater.config.claims import Contrast, Hypothesis, MapSpec
from headwater.config.compute import Compute, engine_problems
from headwater.config.consistency import (
    arm_problems,
    contrast_problems,
    map_problems,
    model_problems,
    task_problems,
)
from headwater.config.distillation import _tuple
from headwater.config.evaluation import Evaluation
from headwater.config.guards import Guards
from headwater.config.lora import LoRA, lora_problems
from headwater.config.paper import expand
from headwater.config.stages import (
    READS_LABELS,
    READS_TEACHER,
    STAGE_MODELS,
    GRPOStage,
    MixedStage,
    ModelStage,
    OPDStage,
    PretrainStage,
    SampleSFTStage,
    Sampling,
    SFTStage,
    WarmupStage,
    outside_teacher,
)
from headwater.config.tracking import ReportTo
from headwater.near_names import near


class Task(Settings):
    """Where problems come from, how they are asked and how answers are checked.

    `worked` is another source for the pool of worked solutions. An evaluation set may be
    `pool:validation`: problems of `train` that no stage may read.
    """

    train: str
    worked: str | None = None
    eval: dict[Name, str] = Field(min_length=1)
    columns: dict[str, str] | None = None
    verifier: str = "math"
    prompt: Literal["boxed", "hash", "answer_is", "bare"] = "boxed"
    verifier_workers: PositiveInt = 1
    verifier_timeout_seconds: PositiveFloat = 5.0
    verifier_correct_from: float = 1.0


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)} repeats a seed; give each once, for instance [0, 1, 2]")
    return seeds


class ModelSpec(Settings):
    """Where a model comes from, and the stages every arm's base is made with.

    `source`: `hf:ID-or-path`, `gguf:path`, `smollm2-135m`, `tiny:NAME`, `prune:MODELNAME`
    (with `layers`: how many to keep, or which). `lora`: adapters that arms train it through.
    `seed`: of its weights and preparation, for one base that every seed of the study starts from.
    """

    source: str
    layers: PositiveInt | Annotated[tuple[int, ...], BeforeValidator(_tuple)] | None = None
    prepare: Chain = ()
    lora: LoRA | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


class PoolSpec(Settings):
    """How the training problems are divided. All pools are disjoint; `split` halves `labels`."""

    labels: PositiveInt
    split: Annotated[tuple[Name, ...], BeforeValidator(_tuple)] = ("1H", "2H")
    prompts: Annotated[int, Field(ge=0)] = 0
    worked: Annotated[int, Field(ge=0)] = 0
    validation: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Every pool a stage may name; NAME:n is the first n problems of one."""
        optional = [n for n in ("prompts", "worked", "validation") if getattr(self, n)]
        return ("labels", *self.split, *optional)

    def size(self, name: str) -> int:
        """Problems of a pool, as far as the recipe alone can tell."""
        if name in self.split:
            part = self.split.index(name)
            return len(range(part, self.labels, len(self.split)))
        return int(getattr(self, name))

    def problem_with(self, name: str) -> str | None:
        """What is wrong with a pool's name, or None."""
        whole, colon, first = name.partition(":")
        if whole not in self.names:
            return (
                f"pool {name!r} is not one of {', '.join(self.names)}; name one of these or add "
                f"it under `pools`{near(whole, self.names)}"
            )
        if not colon:
            return None
        if not (first.isascii() and first.isdigit() and 0 < int(first) <= self.size(whole)):
            return (
                f"pool {name!r}: expected {whole}:N with N from 1 to {self.size(whole)}, the "
                "pool's size; take fewer, or make the pool larger"
            )
        return None


class Stages(Settings):
    """Defaults of each stage kind; an arm may override single keys."""

    pretrain: PretrainStage = PretrainStage()
    sft: SFTStage = SFTStage()
    grpo: GRPOStage = GRPOStage()
    warmup: WarmupStage = WarmupStage()
    sample_sft: SampleSFTStage = SampleSFTStage()
    opd: OPDStage = OPDStage()
    mixed: MixedStage = MixedStage()


class Budget(Settings):
    """Limits on what training may spend over the whole run; None means no limit."""

    labels: PositiveInt | None = None
    verifier_calls: PositiveInt | None = None
    generated_tokens: PositiveInt | None = None
    updates: PositiveInt | None = None

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {k: float(v) for k, v in self.model_dump().items() if v is not None}


class Diagnostics(Settings):
    """How a student's distance to its teacher is measured before, between and after transfers.

    prompts: of the transfer's pool, 0 for none. positions: parts of a response told apart.
    """

    prompts: Annotated[int, Field(ge=0)] = 64
    rollouts_per_prompt: PositiveInt = 1
    positions: PositiveInt = 4
    sampling: Sampling | None = None


class Recipe(Settings):
    """A whole study."""

    name: Name
    question: Annotated[str, Field(max_length=2_000)] | None = None
    task: Task
    models: dict[Name, ModelSpec]
    pools: PoolSpec
    sampling: Sampling = Sampling()
    stages: Stages = Stages()
    arms: dict[Name, Arm] = Field(min_length=1)
    contrasts: Annotated[tuple[Contrast, ...], BeforeValidator(_tuple)] = ()
    hypotheses: dict[Name, Hypothesis] = Field(default_factory=dict)
    map: MapSpec | None = None
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    budget: Budget = Budget()
    guards: Guards = Guards()
    compute: Compute = Compute()
    report_to: ReportTo = ()
    log_completions: PositiveInt | None = None  # a table of them every so many steps
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(_tuple),
        Field(min_length=1),
        AfterValidator(_distinct),
    ] = (0,)

    @property
    def comparisons(self) -> tuple[Contrast, ...]:
        """Every distinct contrast: the hypotheses' claims, then the others."""
        claims = [claim for one in self.hypotheses.values() for claim in one.claims]
        return tuple(dict.fromkeys((*claims, *self.contrasts)))

    def stage(self, item: ChainItem) -> ModelStage:
        """The settings of a chain's stage: the recipe's defaults with the item's overrides."""
        default = getattr(self.stages, item.kind)
        merged = merge(default.model_dump(exclude_unset=True), item.overrides)
        return STAGE_MODELS[item.kind].model_validate(merged)  # type: ignore[return-value]

    def pool(self, item: ChainItem) -> str | None:
        """The pool a chain's stage reads: its own, or the kind's default."""
        if item.kind == "pretrain":
            return None
        if item.pool is not None:
            return item.pool
        if item.kind == "sft":
            return "worked" if self.pools.worked else "labels"
        if item.kind in READS_TEACHER - READS_LABELS and self.pools.prompts:
            return "prompts"
        return "labels"

    def learns_from_arm(self, item: ChainItem) -> bool:
        """Whether a chain's stage learns from the teacher of its arm."""
        return item.kind in READS_TEACHER and outside_teacher(self.stage(item)) is None

    def pools_read(self) -> frozenset[str]:
        """Every pool that some stage of an arm or of a model's preparation reads."""
        chains = [spec.prepare for spec in self.models.values()]
        for arm in self.arms.values():
            chains += [chain for _, chain in arm.models.values()]
        pools = (self.pool(item) for chain in chains for item in chain)
        return frozenset(pool for pool in pools if pool is not None)

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        problems = [
            *task_problems(self),
            *model_problems(self),
            *arm_problems(self),
            *contrast_problems(self),
            *map_problems(self),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        if wrong := [*engine_problems(self), *lora_problems(self)]:
            raise ValueError("; ".join(wrong))
        return self


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`: mappings merge, but not of two kinds; all else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        keep = both and (
            "kind" not in value or value.get("kind") == old.get("kind")  # type: ignore[union-attr]
        )
        merged[key] = merge(old, value) if keep else value  # type: ignore[arg-type]
    return merged
