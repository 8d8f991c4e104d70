"""How much a stage does, from its settings alone: updates, rollouts, labels, tokens.

Counts follow from the settings and are exact unless a budget, dynamic sampling or groups
without signal add or cut some. Tokens are upper bounds: every response as long as it may get.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from headwater.config.recipe import Evaluation
from headwater.config.stages import (
    GRPOStage,
    OPDStage,
    PretrainStage,
    SampleSFTStage,
    SFTStage,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.workflow.graph import StageNode, sampling_of
from headwater.workflow.study import Study

#: Solutions and traces are rarely as long as the length limit.
_MEAN_SOLUTION_TOKENS = 128
_MEAN_TRACE_TOKENS = 48


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one stage does.

    rollouts are drawn in `rollout_batches` of equal size, each at most `max_new_tokens` long;
    `scored`: a teacher reads them too. A micro-batch of training has `micro_batch_tokens`.
    """

    updates: int = 0
    trained_tokens: int = 0
    rollouts: int = 0
    rollout_batches: int = 0
    max_new_tokens: int = 0
    scored: bool = False
    labels: int = 0
    verifier_calls: int = 0
    prompts: int = 0
    micro_batch_tokens: int = 0

    @property
    def generated_tokens(self) -> int:
        """Upper bound."""
        return self.rollouts * self.max_new_tokens


def work_of(study: Study, node: StageNode) -> StageWork:
    """What `node` does in its study."""
    if node.kind == "source":
        return StageWork()
    size = len(study.problems_of(node))
    longest = sampling_of(node, study.recipe).max_new_tokens
    return _KINDS[node.kind](node.settings(), size, longest)


def _evaluate(stage: Evaluation, problems: int, longest: int) -> StageWork:
    return StageWork(
        rollouts=problems * stage.attempts,
        rollout_batches=math.ceil(problems / stage.batch_prompts),
        max_new_tokens=longest,
        labels=problems,
        verifier_calls=problems * stage.attempts,
        prompts=problems,
    )


def _pretrain(stage: PretrainStage, pool_size: int, longest: int) -> StageWork:
    tokens = stage.steps * stage.batch_size * _MEAN_TRACE_TOKENS
    return StageWork(
        updates=stage.steps,
        trained_tokens=tokens,
        micro_batch_tokens=min(stage.micro_batch_tokens, tokens // stage.steps),
    )


def _sft(stage: SFTStage, pool_size: int, longest: int) -> StageWork:
    updates = stage.steps or stage.epochs * math.ceil(pool_size / stage.batch_size)
    tokens = updates * stage.batch_size * _MEAN_SOLUTION_TOKENS
    return StageWork(
        updates=updates,
        trained_tokens=tokens,
        labels=min(pool_size, updates * stage.batch_size),
        micro_batch_tokens=min(stage.micro_batch_tokens, tokens // max(updates, 1)),
    )


def _grpo(stage: GRPOStage, pool_size: int, longest: int) -> StageWork:
    prompts = stage.steps * stage.prompts_per_step
    rollouts = prompts * stage.group_size
    rounds = 1 + (stage.dynamic_sampling.max_rounds if stage.dynamic_sampling else 0)
    per_step = stage.prompts_per_step * stage.group_size * longest
    return StageWork(
        updates=stage.steps * stage.updates_per_batch,
        trained_tokens=rollouts * longest * stage.updates_per_batch,
        rollouts=rollouts * rounds,
        rollout_batches=stage.steps * rounds,
        max_new_tokens=longest,
        labels=min(pool_size, prompts * rounds),
        verifier_calls=rollouts * rounds,
        prompts=prompts * rounds,
        micro_batch_tokens=min(stage.micro_batch_tokens, per_step),
    )


def _teacher_rollouts(stage: TeacherRolloutsStage, pool_size: int, longest: int) -> StageWork:
    return StageWork(
        rollouts=pool_size * stage.rollouts_per_prompt,
        rollout_batches=math.ceil(pool_size / stage.prompts_per_batch),
        max_new_tokens=longest,
        scored=stage.targets is not None,
        prompts=pool_size,
    )


def _cached_rollouts(
    stage: WarmupStage | SampleSFTStage, pool_size: int, longest: int
) -> StageWork:
    rollouts = pool_size * stage.teacher_rollouts_per_prompt
    updates = stage.steps or stage.epochs * math.ceil(rollouts / stage.batch_size)
    per_update = min(stage.batch_size, rollouts) * longest
    return StageWork(
        updates=updates,
        trained_tokens=updates * per_update,
        micro_batch_tokens=min(stage.micro_batch_tokens, per_update),
    )


def _opd(stage: OPDStage, pool_size: int, longest: int) -> StageWork:
    prompts = stage.steps * stage.prompts_per_step
    rollouts = prompts * stage.group_size
    return StageWork(
        updates=stage.steps,
        trained_tokens=rollouts * longest,
        rollouts=rollouts,
        rollout_batches=stage.steps,
        max_new_tokens=longest,
        scored=True,
        prompts=prompts,
        micro_batch_tokens=min(
            stage.micro_batch_tokens, stage.prompts_per_step * stage.group_size * longest
        ),
    )


_KINDS: dict[str, Callable[..., StageWork]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "grpo": _grpo,
    "teacher_rollouts": _teacher_rollouts,
    "warmup": _cached_rollouts,
    "sample_sft": _cached_rollouts,
    "opd": _opd,
    "evaluate": _evaluate,
}
