"""How much a stage does, from its settings alone: updates, rollouts, labels, tokens.

Counts follow from the settings and are exact unless a budget, dynamic sampling or groups
without signal add or cut some. Tokens are upper bounds, every response as long as it may get,
unless a mean response length is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from headwater.config.evaluation import Evaluation
from headwater.config.lora import LoRA
from headwater.config.recipe import Diagnostics
from headwater.config.stages import (
    GRPOStage,
    MixedStage,
    OPDStage,
    OutsideRolloutsStage,
    PretrainStage,
    SampleSFTStage,
    SFTStage,
    TeacherRolloutsStage,
    TrainingStage,
    WarmupStage,
)
from headwater.config.teachers import CachedTeacher
from headwater.workflow.graph import StageNode, sampling_of
from headwater.workflow.study import Study

#: Solutions and traces are rarely as long as the length limit.
_MEAN_SOLUTION_TOKENS = 128
_MEAN_TRACE_TOKENS = 48
#: Tokens that are scored at once where nothing is trained (`teacher_rollouts`, `evals.probe`).
_SCORED_TOKENS, _PROBED_TOKENS = 16384, 4096


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a response: at most, and on average."""

    longest: int
    mean: int


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one stage does.

    rollouts are drawn in `rollout_batches` of equal size, each at most `max_new_tokens` long and
    `mean_new_tokens` on average, as are responses that are only trained on. `scored`: a teacher
    reads them too; `referenced`: the model as it was at the start reads what is trained on. A
    micro-batch of training has `micro_batch_tokens`: a group of rollouts is never divided. An
    update learns from `groups_per_update` groups of at most `group_tokens` tokens (where nothing
    is trained: as many of a batch are scored), and the stage saves itself every
    `checkpoint_seconds`. `lora`: what it trains the model through, if not in full.
    """

    updates: int = 0
    trained_tokens: int = 0
    rollouts: int = 0
    rollout_batches: int = 0
    max_new_tokens: int = 0
    mean_new_tokens: int = 0
    scored: bool = False
    referenced: bool = False
    labels: int = 0
    verifier_calls: int = 0
    prompts: int = 0
    micro_batch_tokens: int = 0
    groups_per_update: int = 0
    group_tokens: int = 0
    checkpoint_seconds: float = 0.0
    lora: LoRA | None = None

    @property
    def prompts_per_batch(self) -> int:
        """Prompts whose rollouts are drawn together."""
        return math.ceil(self.prompts / max(self.rollout_batches, 1))

    @property
    def generated_tokens(self) -> int:
        """Upper bound, unless a mean length was given."""
        return self.rollouts * self.mean_new_tokens

    @property
    def rows_per_batch(self) -> int:
        """Rollouts that are drawn together."""
        return self.rollouts // max(self.rollout_batches, 1)

    @property
    def rows_per_prompt(self) -> int:
        """Rollouts that share a prompt, and its prefill."""
        return self.rollouts // max(self.prompts, 1)


def work_of(study: Study, node: StageNode, mean_response: int | None = None) -> StageWork:
    """What `node` does in its study; mean_response: tokens, at most the stage's own limit."""
    if node.kind == "source":
        return StageWork()
    size = len(study.problems_of(node))
    longest = sampling_of(node, study.recipe).max_new_tokens
    lengths = Lengths(longest, min(longest, mean_response or longest))
    settings = node.settings()
    work = _KINDS[node.kind](settings, size, lengths)
    lora = settings.lora if isinstance(settings, TrainingStage) else None
    return replace(work, lora=lora) if lora else work


def _evaluate(stage: Evaluation, problems: int, lengths: Lengths) -> StageWork:
    return StageWork(
        rollouts=problems * stage.attempts,
        rollout_batches=math.ceil(problems / stage.batch_prompts),
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        labels=problems,
        verifier_calls=problems * stage.attempts,
        prompts=problems,
    )


def _probe(stage: Diagnostics, pool_size: int, lengths: Lengths) -> StageWork:
    prompts = min(stage.prompts, pool_size)
    return StageWork(
        rollouts=prompts * stage.rollouts_per_prompt,
        rollout_batches=1,
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        scored=True,
        prompts=prompts,
        micro_batch_tokens=max(_PROBED_TOKENS, stage.rollouts_per_prompt * lengths.longest),
        groups_per_update=prompts,
        group_tokens=stage.rollouts_per_prompt * lengths.longest,
    )


def _pretrain(stage: PretrainStage, pool_size: int, lengths: Lengths) -> StageWork:
    tokens = stage.steps * stage.batch_size * _MEAN_TRACE_TOKENS
    return StageWork(
        updates=stage.steps,
        trained_tokens=tokens,
        mean_new_tokens=_MEAN_TRACE_TOKENS,
        micro_batch_tokens=min(stage.micro_batch_tokens, tokens // stage.steps),
        groups_per_update=stage.batch_size,
        group_tokens=_MEAN_TRACE_TOKENS,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _sft(stage: SFTStage, pool_size: int, lengths: Lengths) -> StageWork:
    updates = stage.steps or stage.epochs * math.ceil(pool_size / stage.batch_size)
    tokens = updates * stage.batch_size * _MEAN_SOLUTION_TOKENS
    return StageWork(
        updates=updates,
        trained_tokens=tokens,
        mean_new_tokens=_MEAN_SOLUTION_TOKENS,
        labels=min(pool_size, updates * stage.batch_size),
        micro_batch_tokens=min(stage.micro_batch_tokens, tokens // max(updates, 1)),
        groups_per_update=stage.batch_size,
        group_tokens=_MEAN_SOLUTION_TOKENS,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _grpo(stage: GRPOStage, pool_size: int, lengths: Lengths) -> StageWork:
    prompts = stage.steps * stage.prompts_per_step
    rollouts = prompts * stage.group_size
    rounds = 1 + (stage.dynamic_sampling.max_rounds if stage.dynamic_sampling else 0)
    group = stage.group_size * lengths.longest
    return StageWork(
        updates=stage.steps * stage.updates_per_batch,
        trained_tokens=rollouts * lengths.mean * stage.updates_per_batch,
        rollouts=rollouts * rounds,
        rollout_batches=stage.steps * rounds,
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        referenced=stage.kl.coefficient > 0,
        labels=min(pool_size, prompts * rounds),
        verifier_calls=rollouts * rounds,
        prompts=prompts * rounds,
        micro_batch_tokens=_micro_batch(stage, group, stage.prompts_per_step),
        groups_per_update=stage.prompts_per_step,
        group_tokens=group,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _teacher_rollouts(stage: TeacherRolloutsStage, pool_size: int, lengths: Lengths) -> StageWork:
    return StageWork(
        rollouts=pool_size * stage.rollouts_per_prompt,
        rollout_batches=math.ceil(pool_size / stage.prompts_per_batch),
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        scored=stage.targets is not None,
        prompts=pool_size,
        micro_batch_tokens=max(_SCORED_TOKENS, stage.rollouts_per_prompt * lengths.longest),
        groups_per_update=min(stage.prompts_per_batch, pool_size),
        group_tokens=stage.rollouts_per_prompt * lengths.longest,
    )


def _outside_rollouts(stage: OutsideRolloutsStage, pool_size: int, lengths: Lengths) -> StageWork:
    if isinstance(stage.teacher, CachedTeacher):
        return StageWork()
    return StageWork(
        rollouts=pool_size * stage.rollouts_per_prompt,
        rollout_batches=math.ceil(pool_size / stage.prompts_per_batch),
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        prompts=pool_size,
    )


def _cached_rollouts(
    stage: WarmupStage | SampleSFTStage, pool_size: int, lengths: Lengths
) -> StageWork:
    rollouts = pool_size * stage.teacher_rollouts_per_prompt
    updates = stage.steps or stage.epochs * math.ceil(rollouts / stage.batch_size)
    rows = min(stage.batch_size, rollouts)
    return StageWork(
        updates=updates,
        trained_tokens=updates * rows * lengths.mean,
        mean_new_tokens=lengths.mean,
        micro_batch_tokens=_micro_batch(stage, lengths.longest, rows),
        groups_per_update=rows,
        group_tokens=lengths.longest,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _opd(stage: OPDStage, pool_size: int, lengths: Lengths) -> StageWork:
    prompts = stage.steps * stage.prompts_per_step
    rollouts = prompts * stage.group_size
    group = stage.group_size * lengths.longest
    return StageWork(
        updates=stage.steps,
        trained_tokens=rollouts * lengths.mean,
        rollouts=rollouts,
        rollout_batches=stage.steps,
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        scored=True,
        prompts=prompts,
        micro_batch_tokens=_micro_batch(stage, group, stage.prompts_per_step),
        groups_per_update=stage.prompts_per_step,
        group_tokens=group,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _mixed(stage: MixedStage, pool_size: int, lengths: Lengths) -> StageWork:
    weights = [stage.lambda_at(step) for step in range(stage.steps)]
    graded = sum(weight > 0 for weight in weights) * stage.prompts_per_step
    prompts = stage.steps * stage.prompts_per_step
    rollouts = prompts * stage.group_size
    group = stage.group_size * lengths.longest
    return StageWork(
        updates=stage.steps * stage.updates_per_batch,
        trained_tokens=rollouts * lengths.mean * stage.updates_per_batch,
        rollouts=rollouts,
        rollout_batches=stage.steps,
        max_new_tokens=lengths.longest,
        mean_new_tokens=lengths.mean,
        scored=min(weights) < 1,
        referenced=stage.kl.coefficient > 0,
        labels=min(pool_size, graded),
        verifier_calls=graded * stage.group_size,
        prompts=prompts,
        micro_batch_tokens=_micro_batch(stage, group, stage.prompts_per_step),
        groups_per_update=stage.prompts_per_step,
        group_tokens=group,
        checkpoint_seconds=stage.checkpoint_seconds,
    )


def _micro_batch(stage: TrainingStage, group_tokens: int, groups: int) -> int:
    """Tokens at once: as many as allowed, but no less than a group and no more than there are."""
    return min(max(stage.micro_batch_tokens, group_tokens), groups * group_tokens)


_KINDS: dict[str, Callable[..., StageWork]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "grpo": _grpo,
    "teacher_rollouts": _teacher_rollouts,
    "outside_rollouts": _outside_rollouts,
    "warmup": _cached_rollouts,
    "sample_sft": _cached_rollouts,
    "opd": _opd,
    "mixed": _mixed,
    "evaluate": _evaluate,
    "probe": _probe,
}
