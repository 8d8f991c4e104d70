"""Two chunk losses on the same logits, weighted: a verifier's reward and a teacher's."""

from __future__ import annotations

import torch

from headwater.losses.chunked_head import ChunkLoss
from headwater.types import LossSums


def mixed_loss(
    reward: ChunkLoss | None,
    dense: ChunkLoss,
    *,
    reward_weight: float,
    dense_weight: float,
    temperature: float,
) -> ChunkLoss:
    """reward_weight * reward(logits / temperature) + dense_weight * dense(logits).

    Minus J of arXiv:2605.12483, Eq. 3, with reward_weight = lambda and dense_weight =
    (1 - lambda) * beta. The losses meet as they are: nothing is centred or scaled after they are
    added. reward None: a step that grades nothing. The logits, as `chunked_head_loss` makes them
    at temperature 1, are held twice [C, V]. A metric that both give is the dense loss's.
    """

    def loss(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, torch.Tensor | None]:
        own_CV = None if reward is None else logits_CV / temperature
        sums, grad_CV = dense(logits_CV, part, wants_gradient)
        value = dense_weight * sums.loss_sum
        metrics = dict(sums.metrics)
        if grad_CV is not None:
            grad_CV.mul_(dense_weight)
        if reward is not None and own_CV is not None:
            rewarded, slope_CV = reward(own_CV, part, wants_gradient)
            value = value + reward_weight * rewarded.loss_sum
            metrics = {**rewarded.metrics, **metrics}
            if grad_CV is not None and slope_CV is not None:
                grad_CV.add_(slope_CV, alpha=reward_weight / temperature)
        return LossSums(value, sums.denominator, metrics), grad_CV

    return loss
