"""Grading a step's rollouts through the vault, and what grades say of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.losses.grpo import zero_variance
from headwater.stages.learner import Learner
from headwater.stages.rollouts import RolloutBatch, RolloutSource
from headwater.types import Problem, RolloutGroup, Verdict
from headwater.verify.grading import Grade

#: A problem, its rollouts, their texts and what these earned.
Graded = tuple[Problem, RolloutGroup, Sequence[str], list[Grade]]


def grade_groups(
    learner: Learner,
    source: RolloutSource,
    problems: Sequence[Problem],
    groups: Sequence[RolloutGroup],
) -> list[Graded]:
    """Charge the rollouts, then grade them: the vault charges labels and calls before it reads.

    Raises BudgetExhausted for what a budget does not allow.
    """
    texts = [[source.text(r) for r in group.rollouts] for group in groups]
    assert learner.context.vault is not None
    generated = sum(len(r.response_ids) for g in groups for r in g.rollouts)
    learner.charge_sampling(len(problems), generated)
    requests = [
        (problem.id, text) for problem, own in zip(problems, texts, strict=True) for text in own
    ]
    grades = iter(learner.context.vault.grade(learner.context.account, requests))
    return [
        (problem, group, own, [next(grades) for _ in own])
        for problem, group, own in zip(problems, groups, texts, strict=True)
    ]


def apart(
    graded: Sequence[Graded],
) -> tuple[list[Problem], RolloutBatch, list[str], list[Grade]]:
    """Problems, their rollouts as one batch, and texts and grades in the order of its rows."""
    return (
        [problem for problem, *_ in graded],
        RolloutBatch(tuple(group for _, group, *_ in graded)),
        [text for *_, texts, _ in graded for text in texts],
        [grade for *_, grades in graded for grade in grades],
    )


def rewards_of(grades: Sequence[Grade], prompts: int) -> torch.Tensor:
    """Rewards in groups, float32 [P, G]."""
    return torch.tensor([grade.reward for grade in grades]).view(prompts, -1)


def grade_metrics(grades: Sequence[Grade], rewards_PG: torch.Tensor) -> dict[str, float]:
    """Mean reward, pass rate and what went wrong, of one step."""
    verdicts, count = [grade.verdict for grade in grades], len(grades)
    return {
        "reward": float(rewards_PG.mean()),
        "reward_std": float(rewards_PG.std()),
        "pass_rate": sum(v is Verdict.CORRECT for v in verdicts) / count,
        "zero_variance_share": float(zero_variance(rewards_PG).float().mean()),
        "unparseable_share": sum(v is Verdict.UNPARSEABLE for v in verdicts) / count,
        "timeout_share": sum(v is Verdict.TIMEOUT for v in verdicts) / count,
    }
