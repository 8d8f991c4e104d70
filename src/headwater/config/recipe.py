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
    ValidationError,
    model_validator,
)

from headwater.config.arms import Arm, Chain, ChainItem, Name
from headwater.config.base import Settings
from headwater.config.claims import Contrast, Hypothesis, MapSpec
from headwater.config.compute import Compute, engine_problems
from headwater.config.evaluation import Evaluation
from headwater.config.explain import explain
from headwater.config.guards import Guards
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
    _tuple,
    outside_teacher,
)


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
    (with `layers`: how many to keep, or which).
    """

    source: str
    layers: PositiveInt | Annotated[tuple[int, ...], BeforeValidator(_tuple)] | None = None
    prepare: Chain = ()


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
                "it under `pools`"
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
            chains += [arm.teacher or (), arm.student or ()]
        pools = (self.pool(item) for chain in chains for item in chain)
        return frozenset(pool for pool in pools if pool is not None)

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        problems = [
            *_task_problems(self),
            *_model_problems(self),
            *_arm_problems(self),
            *_contrast_problems(self),
            *_map_problems(self),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        if wrong := engine_problems(self):
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


def _task_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, source in recipe.task.eval.items():
        if not source.startswith("pool:"):
            continue
        if source != "pool:validation" or not recipe.pools.validation:
            found.append(
                f"task.eval.{name}={source}: expected pool:validation with pools.validation set; "
                "no other pool is kept from training"
            )
    if recipe.task.worked is not None and not recipe.pools.worked:
        found.append("task.worked is given but pools.worked is 0; say how many to take")
    return found


def _model_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, spec in recipe.models.items():
        if spec.source.startswith("prune:"):
            parent = spec.source.removeprefix("prune:")
            if parent not in recipe.models or parent == name:
                found.append(
                    f"models.{name}.source={spec.source}: expected prune:MODEL with MODEL one of "
                    f"{sorted(set(recipe.models) - {name})}"
                )
            if spec.layers is None:
                found.append(f"models.{name}: prune: needs `layers` (how many to keep, or which)")
            found += _prune_circle(recipe, name)
        elif spec.layers is not None:
            found.append(f"models.{name}.layers: only prune: sources take `layers`; remove it")
        for index, item in enumerate(spec.prepare):
            where = f"models.{name}.prepare[{index}]"
            if item.kind not in ("pretrain", "sft"):
                found.append(f"{where}: {item.kind} cannot prepare a base; use pretrain or sft")
            found += _item_problems(recipe, item, where)
    return found


def _prune_circle(recipe: Recipe, name: str) -> list[str]:
    """A line where following parents from a model leads back to it by way of others."""
    way = [name]
    while way[-1] in recipe.models and len(way) <= len(recipe.models):
        prefix, _, parent = recipe.models[way[-1]].source.partition(":")
        if prefix != "prune":
            return []
        way.append(parent)
        if parent == name:
            break
    if way[-1] != name or len(way) < 3:  # another's circle, or a parent that does not exist
        return []
    return [
        f"models.{name}.source: pruned from itself ({' -> '.join(way)}); start the circle from a "
        "model with weights of its own"
    ]


def _item_problems(recipe: Recipe, item: ChainItem, where: str) -> list[str]:
    found = []
    pool = recipe.pool(item)
    wrong = None if pool is None else recipe.pools.problem_with(pool)
    if wrong is not None:
        found.append(f"{where}: {wrong}")
    pool = None if pool is None else pool.partition(":")[0]
    if item.kind == "pretrain" and item.pool is not None:
        found.append(
            f"{where}: pretrain makes its own traces and reads no pool, but is given "
            f"{item.pool!r}; remove it, or use sft to train on a pool"
        )
    if pool == "validation":
        found.append(f"{where}: pool 'validation' is kept from training; use another")
    if item.kind in ("grpo", "mixed") and pool in ("prompts", "worked"):
        found.append(
            f"{where}: {item.kind} cannot read pool {pool!r}, which has no labels; use labels"
        )
    try:
        recipe.stage(item)
    except ValidationError as error:
        model = STAGE_MODELS[item.kind]
        found += [f"{where}.{item.kind}: {explain(model, problem)}" for problem in error.errors()]
    return found


def _arm_problems(recipe: Recipe) -> list[str]:
    found = []
    for name, arm in recipe.arms.items():
        roles = (
            ("teacher", arm.teacher, arm.teacher_model),
            ("student", arm.student, arm.student_model),
        )
        for role, chain, model in roles:
            if chain is None:
                continue
            if model not in recipe.models:
                found.append(
                    f"arms.{name}: model {model!r} is not one of {sorted(recipe.models)}; "
                    f"add it under `models` or set {role}_model"
                )
            for index, item in enumerate(chain):
                where = f"arms.{name}.{role}[{index}]"
                wrong = _item_problems(recipe, item, where)
                found += wrong
                if item.kind == "pretrain":
                    found.append(f"{where}: pretrain belongs under models.NAME.prepare")
                alone = role == "teacher" or arm.teacher is None
                if alone and not wrong and recipe.learns_from_arm(item):
                    found.append(
                        f"{where}: {item.kind} needs a teacher; use it in a student chain and "
                        "give the arm a teacher chain (`teacher: []` is the raw teacher)"
                    )
    return found


def _contrast_problems(recipe: Recipe) -> list[str]:
    found = []
    named = [(f"contrasts[{index}]", one) for index, one in enumerate(recipe.contrasts)]
    for name, hypothesis in recipe.hypotheses.items():
        named += [
            (f"hypotheses.{name}.claims[{index}]", one)
            for index, one in enumerate(hypothesis.claims)
        ]
    for where, contrast in named:
        if contrast.better == contrast.than:
            found.append(f"{where}: {contrast.better!r} is compared with itself; name two arms")
        for side, arm in (("better", contrast.better), ("than", contrast.than)):
            if arm not in recipe.arms:
                found.append(
                    f"{where}.{side}: {arm!r} is not an arm; choose from {sorted(recipe.arms)}"
                )
    return found


def _map_problems(recipe: Recipe) -> list[str]:
    spec = recipe.map
    if spec is None:
        return []
    found = [
        f"map.{role}: {getattr(spec, role)!r} is not an arm; choose from {sorted(recipe.arms)}"
        for role in ("rule", "against")
        if getattr(spec, role) not in recipe.arms
    ]
    found += [
        f"map.students: {student!r} is not one of {sorted(recipe.models)}; add it under `models`"
        for student in spec.students
        if student not in recipe.models
    ]
    return found
