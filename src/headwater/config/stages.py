"""Settings of every stage kind, with defaults that suit a small model and few labels."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from headwater.config.base import Settings
from headwater.config.distillation import (
    CacheableTargets,
    Divergence,
    Fraction,
    FullVocabulary,
    ReverseKL,
    Targets,
    _tuple,
)
from headwater.config.lora import StageLoRA
from headwater.config.reward_weight import Lambda, LambdaSchedule
from headwater.config.teachers import OpenAITeacher, OutsideTeacher


class Sampling(Settings):
    """How responses are drawn. Filters are off, as in the paper: they bias importance ratios."""

    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 512


# --- training ------------------------------------------------------------------------------------


class TrainingStage(Settings):
    """Optimiser settings every training stage has. AdamW; gradients clipped by global norm.

    lora: adapters of this stage, false for none, null for those of its model (of `prepare`: none).
    """

    lr: PositiveFloat = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_tuple)] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    checkpoint_seconds: PositiveFloat = 30.0
    lora: StageLoRA = None


class PretrainStage(TrainingStage):
    """Makes an embedded model from scratch on traces of mixed quality (task:arithmetic)."""

    kind: Literal["pretrain"] = "pretrain"
    steps: PositiveInt = 400
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 2e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    worked: Fraction = 0.4
    careless: Fraction = 0.3
    guessed: Fraction = 0.3
    slip_rate: Fraction = 0.3

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = self.worked + self.careless + self.guessed
        if abs(total - 1.0) > 1e-6:
            raise ValueError(
                f"worked + careless + guessed = {total:g}, expected 1; make the shares sum to 1"
            )
        return self

    @model_validator(mode="after")
    def _in_full(self) -> Self:
        if self.lora:
            raise ValueError(
                f"lora of rank {self.lora.rank}: pretrain makes a model from random weights, of "
                "which an adapter would keep most; expected null: remove lora here"
            )
        return self


class SFTStage(TrainingStage):
    """Cross-entropy on worked solutions."""

    kind: Literal["sft"] = "sft"
    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1e-5


class KLPenalty(Settings):
    """KL(policy || reference) added to the loss; off unless `kl` is given.

    Estimators that can be differentiated: k2 (half squared log-ratio), k3 (ratio - 1 -
    log-ratio), exact (over the vocabulary)."""

    coefficient: Annotated[float, Field(ge=0)] = 5e-4
    estimator: Literal["k2", "k3", "exact"] = "k3"


class DynamicSampling(Settings):
    """Replace groups whose rewards are all equal by fresh prompts, at most `max_rounds` times."""

    max_rounds: PositiveInt = 2


class GRPOStage(TrainingStage):
    """Group-relative policy optimisation with a verifier's reward.

    overlap: the next step's rollouts are drawn before this step's update, by servers during it.
    """

    kind: Literal["grpo"] = "grpo"
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    group_size: PositiveInt = 8
    advantage: Literal["group_std", "group_mean"] = "group_std"
    normalization: Literal["token", "sequence", "constant"] = "token"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    updates_per_batch: PositiveInt = 1
    importance_cap: PositiveFloat | None = 2.0
    kl: KLPenalty = KLPenalty(coefficient=0.0)
    dynamic_sampling: DynamicSampling | None = None
    overlap: bool = False
    sampling: Sampling | None = None

    @model_validator(mode="after")
    def _ahead(self) -> Self:
        if self.overlap and self.dynamic_sampling is not None:
            raise ValueError(
                "overlap: true draws a step's prompts before it is known which groups of the step "
                "before are flat, which dynamic_sampling waits for; remove one of them"
            )
        _require_correction(self)
        return self

    @model_validator(mode="after")
    def _groups(self) -> Self:
        _require_groups(self)
        return self


class TeacherRolloutsStage(Settings):
    """Teacher rollouts with the teacher's distributions, sampled once and cached."""

    kind: Literal["teacher_rollouts"] = "teacher_rollouts"
    rollouts_per_prompt: PositiveInt = 1
    targets: CacheableTargets | None = FullVocabulary()
    sampling: Sampling
    prompts_per_batch: PositiveInt = 64


class OutsideRolloutsStage(Settings):
    """Rollouts of a teacher from outside the study, in the place of `TeacherRolloutsStage`."""

    kind: Literal["outside_rollouts"] = "outside_rollouts"
    teacher: OutsideTeacher
    rollouts_per_prompt: PositiveInt = 1
    targets: CacheableTargets | None = None
    sampling: Sampling
    prompts_per_batch: PositiveInt = 64


class WarmupStage(TrainingStage):
    """Forward KL on cached teacher rollouts with the teacher's distributions (Eq. 5).

    rollouts: from where, if not from the arm's teacher.
    """

    kind: Literal["warmup"] = "warmup"
    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 64
    teacher_rollouts_per_prompt: PositiveInt = 1
    targets: CacheableTargets = FullVocabulary()
    teacher_temperature: PositiveFloat = 1.0
    sampling: Sampling | None = None
    rollouts: OutsideTeacher | None = None

    @model_validator(mode="after")
    def _served(self) -> Self:
        if isinstance(self.rollouts, OpenAITeacher) and self.targets.kind == "full":
            raise ValueError(
                f"targets: full with rollouts of {self.rollouts.name}, whose server gives no whole "
                "distribution; set targets: {kind: top_k, k: 20}, or use sample_sft"
            )
        return self

    @model_validator(mode="after")
    def _cached_as_it_is(self) -> Self:
        if self.targets.kind == "top_k" and self.teacher_temperature != 1.0:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature:g} with targets: top_k, which are "
                "cached at temperature 1; use targets: full, or teacher_temperature: 1.0"
            )
        return self


class SampleSFTStage(TrainingStage):
    """Cross-entropy on teacher samples (hard labels): the baseline the warmup is compared to.

    rollouts: from where, if not from the arm's teacher.
    """

    kind: Literal["sample_sft"] = "sample_sft"
    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 64
    teacher_rollouts_per_prompt: PositiveInt = 1
    sampling: Sampling | None = None
    rollouts: OutsideTeacher | None = None


class OPDStage(TrainingStage):
    """On-policy distillation: a KL to the teacher on the student's own rollouts (Eq. 4).

    overlap: the next step's rollouts are drawn, and scored by servers, before this step's update.
    importance_cap: for sampled targets; a KL over a distribution needs no weight for the token, and
    with overlap is taken at states of the student as it was one update before.
    """

    kind: Literal["opd"] = "opd"
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    group_size: PositiveInt = 4
    kl: Divergence = ReverseKL()
    targets: Targets = FullVocabulary()
    teacher_temperature: PositiveFloat = 1.0
    normalization: Literal["token", "sequence", "constant"] = "token"
    importance_cap: PositiveFloat | None = 2.0
    overlap: bool = False
    sampling: Sampling | None = None

    @model_validator(mode="after")
    def _ahead(self) -> Self:
        if self.targets.kind == "sampled":
            _require_correction(self)
        return self

    @model_validator(mode="after")
    def _sampled_is_reverse(self) -> Self:
        _require_reverse(self.targets, self.kl, "kl")
        return self


class MixedStage(TrainingStage):
    """A verifier's reward and a teacher's, mixed, on the student's own rollouts (Eq. 3).

    lambda weighs grpo's loss, (1 - lambda) * beta that of opd: 1 is grpo, 0 is opd; see
    `LambdaSchedule`. kl is grpo's penalty, divergence what opd calls kl. A step with lambda 0
    grades nothing, one with lambda 1 asks no teacher. The rest is as in grpo and opd.
    """

    model_config = ConfigDict(
        serialize_by_alias=True, validate_by_alias=True, validate_by_name=True
    )

    kind: Literal["mixed"] = "mixed"
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 16
    group_size: PositiveInt = 8
    lambda_: Lambda = Field(default=LambdaSchedule(start=0.5, end=0.5), alias="lambda")
    beta: PositiveFloat = 1.0
    divergence: Divergence = ReverseKL()
    targets: Targets = FullVocabulary()
    teacher_temperature: PositiveFloat = 1.0
    advantage: Literal["group_std", "group_mean"] = "group_std"
    normalization: Literal["token", "sequence", "constant"] = "token"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    updates_per_batch: PositiveInt = 1
    importance_cap: PositiveFloat | None = 2.0
    kl: KLPenalty = KLPenalty(coefficient=0.0)
    overlap: bool = False
    sampling: Sampling | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _require_groups(self)
        _require_correction(self)
        _require_reverse(self.targets, self.divergence, "divergence")
        return self

    def lambda_at(self, step: int) -> float:
        """The weight of the verifier's reward at a step, from 0."""
        return self.lambda_.at(step, self.steps)


def _require_groups(stage: GRPOStage | MixedStage) -> None:
    """Advantages compare a group's rollouts. Raises ValueError."""
    if stage.group_size < 2:
        raise ValueError("group_size=1 gives zero advantages; set group_size >= 2")


def _require_reverse(targets: Targets, divergence: Divergence, key: str) -> None:
    """The sampled token estimates one divergence only. Raises ValueError."""
    if targets.kind == "sampled" and divergence.kind != "reverse":
        raise ValueError(
            f"targets: sampled estimates the reverse KL only, but {key} is {divergence.kind}; "
            f"set {key}: reverse, or targets: full or top_k"
        )


def _require_correction(stage: GRPOStage | OPDStage | MixedStage) -> None:
    """A stage that is off policy needs importance weights. Raises ValueError."""
    if stage.overlap and stage.importance_cap is None:
        raise ValueError(
            "overlap: true trains on rollouts of weights one step older, which importance_cap: "
            "null leaves uncorrected; set importance_cap, such as 2.0"
        )


ModelStage = (
    PretrainStage | SFTStage | GRPOStage | WarmupStage | SampleSFTStage | OPDStage | MixedStage
)

STAGE_MODELS: dict[str, type[TrainingStage]] = {
    "pretrain": PretrainStage,
    "sft": SFTStage,
    "grpo": GRPOStage,
    "warmup": WarmupStage,
    "sample_sft": SampleSFTStage,
    "opd": OPDStage,
    "mixed": MixedStage,
}

#: Stages that read gold answers or worked solutions through the vault.
READS_LABELS = frozenset({"sft", "grpo", "mixed"})
#: Stages that learn from a teacher.
READS_TEACHER = frozenset({"warmup", "sample_sft", "opd", "mixed"})


def outside_teacher(stage: TrainingStage) -> OutsideTeacher | None:
    """Who a stage learns from in the place of its arm's teacher; None where that one teaches."""
    return stage.rollouts if isinstance(stage, WarmupStage | SampleSFTStage) else None
