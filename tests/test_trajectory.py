"""Ten optimiser steps of the engine against ten plain ones in float64."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch

from headwater.config.stages import GRPOStage
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.fused_layers import fuse_layers
from headwater.engine.packing import PackedGroup, micro_batches, pack
from headwater.engine.update import Updater, learning_rate
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import (
    PolicySettings,
    PolicyTerms,
    distillation_loss,
    policy_loss,
)
from headwater.models.tiny import tiny_model
from headwater.types import FullTargets, LossSums

STEPS, GROUPS, WIDTH, VOCAB = 10, 3, 4, 60
STAGE = GRPOStage(lr=2e-3, warmup_steps=3, schedule="cosine", grad_clip=0.5, weight_decay=0.1)
CAP = 1.05


def _batch(step: int) -> list[PackedGroup]:
    rng = random.Random(step)

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(shortest, longest)))

    return [
        PackedGroup(
            ids(2, 9),
            tuple(ids(1, 14) for _ in range(WIDTH)),
            tuple(range(g * WIDTH, (g + 1) * WIDTH)),
        )
        for g in range(GROUPS)
    ]


def _advantages(step: int) -> list[float]:
    """One group of three has no gradient; it counts in the denominator."""
    rng = random.Random(100 + step)
    return [0.0 if row < WIDTH else rng.choice((-1.0, 0.5, 2.0)) for row in range(GROUPS * WIDTH)]


def _drift(token: int, place: int) -> float:
    """How far a sampler's log-probability lies below the trainer's."""
    return 0.02 * ((token + 3 * place) % 5 - 1)


def _tokens(groups: list[PackedGroup]) -> int:
    return sum(len(completion) for group in groups for completion in group.completions)


class _Plain:
    """Every sequence for itself, in float64, by autograd; torch's own AdamW and clipping."""

    def __init__(self, model: torch.nn.Module, teacher: torch.nn.Module | None) -> None:
        self.model, self.teacher = model.double(), teacher
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=STAGE.betas, weight_decay=STAGE.weight_decay
        )

    def step(self, number: int) -> float:
        groups, advantages = _batch(number), _advantages(number)
        total = torch.zeros((), dtype=torch.float64)
        for group in groups:
            for row, completion in zip(group.rows, group.completions, strict=True):
                ids = torch.tensor([[*group.prompt_ids, *completion]])
                start = len(group.prompt_ids)
                logprobs = self._logprobs(self.model, ids, start)
                if self.teacher is None:
                    total = total + self._policy(logprobs, completion, advantages[row])
                else:
                    with torch.no_grad():
                        theirs = self._logprobs(self.teacher, ids, start)
                    total = total + (logprobs.exp() * (logprobs - theirs)).sum()
        loss = total / _tokens(groups)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), STAGE.grad_clip)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = learning_rate(STAGE, number, STEPS)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    @staticmethod
    def _logprobs(model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[0, start - 1 : -1, :VOCAB]
        return torch.log_softmax(logits, -1)

    @staticmethod
    def _policy(
        logprobs: torch.Tensor, completion: tuple[int, ...], advantage: float
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for place, token in enumerate(completion):
            logprob = logprobs[place, token]
            ratio = (logprob - logprob.detach()).exp()
            total = total - min(2.718281828459045 ** _drift(token, place), CAP) * ratio * advantage
        return total


class _Ours:
    """The engine: packed groups, skipped groups, micro-batches, chunks, float32 masters."""

    def __init__(
        self, model: torch.nn.Module, teacher: torch.nn.Module | None, dtype: torch.dtype
    ) -> None:
        for one in (model, *([] if teacher is None else [teacher])):
            one.set_attn_implementation("headwater")
            fuse_layers(one)
        self.model, self.dtype = model, dtype
        self.teacher = None if teacher is None else teacher.to(dtype)
        self.updater = Updater(model, STAGE, STEPS, dtype)

    def step(self, number: int) -> float:
        groups, advantages = _batch(number), _advantages(number)
        trained = groups
        if self.teacher is None:  # groups without gradient are left out
            trained = [g for g in groups if any(advantages[row] for row in g.rows)]
            assert len(trained) == GROUPS - 1
        losses = [
            partial(self._loss, micro, torch.tensor(advantages))
            for micro in micro_batches(trained, 50)
        ]
        assert len(losses) > 1
        return self.updater.step(losses, float(_tokens(groups))).loss

    def _loss(self, micro: tuple[PackedGroup, ...], advantages: torch.Tensor) -> LossSums:
        batch = pack(micro, dtype=self.dtype, device="cpu")
        hidden, head = hidden_at_targets(self.model, batch), head_weight(self.model, VOCAB)
        ones = torch.ones(batch.target_ids_T.shape[0])
        if self.teacher is not None:
            with torch.no_grad():
                theirs = hidden_at_targets(self.teacher, batch)
            targets = FullTargets(theirs, head_weight(self.teacher, VOCAB))
            loss = distillation_loss(batch.target_ids_T, ones, targets, forward_weight=0.0)
            return chunked_head_loss(hidden, head, loss, tokens_per_chunk=11)
        completions = {
            row: completion
            for group in micro
            for row, completion in zip(group.rows, group.completions, strict=True)
        }
        drift = [
            _drift(token, place)
            for row in batch.rows
            for place, token in enumerate(completions[row])
        ]
        with torch.no_grad():
            logits = (hidden @ head.T).float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, batch.target_ids_T[:, None])[:, 0]
        terms = PolicyTerms(
            targets_T=batch.target_ids_T,
            advantages_T=advantages[batch.row_T],
            weights_T=ones,
            sampler_logprobs_T=logprobs - torch.tensor(drift),
        )
        settings = PolicySettings(STAGE.clip_low, STAGE.clip_high, CAP)
        loss = policy_loss(terms, settings, lambda logprobs, part: None)
        return chunked_head_loss(hidden, head, loss, tokens_per_chunk=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["grpo", "opd"])
def test_ten_steps_follow_the_plain_trajectory(kind: str, dtype: torch.dtype) -> None:
    start = tiny_model("student", seed=5)
    teacher = tiny_model("teacher", seed=6) if kind == "opd" else None
    double_teacher = None if teacher is None else copy.deepcopy(teacher).double()
    plain = _Plain(copy.deepcopy(start), double_teacher)
    ours = _Ours(copy.deepcopy(start), teacher, dtype)
    exact, coarse = dtype == torch.float32, 0.03
    for number in range(STEPS):
        expected, found = plain.step(number), ours.step(number)
        assert found == pytest.approx(expected, rel=1e-4 if exact else coarse, abs=1e-5), number
    for before, p, q in zip(
        start.parameters(), plain.model.parameters(), ours.updater.masters, strict=True
    ):
        moved = (p - before.double()).detach().norm()
        apart = (q.double() - p).detach().norm()
        assert float(moved) > 0.0
        assert float(apart) <= (1e-3 if exact else 0.2) * float(moved)
