"""What a teacher says of a step's rollouts: a divergence at every token."""

from __future__ import annotations

import torch

from headwater.config.compute import VLLM
from headwater.config.distillation import Divergence, MixedKL
from headwater.config.stages import MixedStage, OPDStage
from headwater.engine.packing import TokenBatch
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.token_losses import distillation_loss
from headwater.rollout.engines import Serving
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.teachers import ServedRows, make_teacher, most_logprobs
from headwater.stages.ahead import Score
from headwater.stages.learner import Learner
from headwater.stages.rollouts import RolloutBatch


def forward_weight(divergence: Divergence) -> float:
    """Weight of the forward KL in a divergence: 1 forward, 0 reverse, between for mixed."""
    if isinstance(divergence, MixedKL):
        return divergence.forward_weight
    return 1.0 if divergence.kind == "forward" else 0.0


class TeacherTerm:
    """The distillation loss of a stage on its own rollouts.

    temperature: of those rollouts. local: the teacher where this process has it. score: asks
    servers about rollouts ahead, None where there are none.
    """

    def __init__(
        self,
        learner: Learner,
        config: OPDStage | MixedStage,
        divergence: Divergence,
        temperature: float,
    ) -> None:
        job = learner.job
        assert job.teacher_dir is not None
        self.learner, self.config, self.temperature = learner, config, temperature
        self._forward_weight = forward_weight(divergence)
        served = isinstance(job.compute.scoring, VLLM)
        self.local: FrozenModel | None = None if served else learner.frozen(job.teacher_dir)
        self._teacher = make_teacher(
            job.compute,
            Serving(
                job.teacher_dir,
                job.checkpoint_dir,
                learner.context.closing,
                max_logprobs=most_logprobs(config.targets),
            ),
            learner.vocab_size,
            config.targets,
            config.teacher_temperature,
            local=self.local,
            is_main=learner.world.is_main,
        )
        self.score: Score | None = self._teacher.ask if served else None

    def prepare(self, scores: ServedRows | None) -> None:
        """Keep what `score` said of the rollouts that come next."""
        self._teacher.prepare(scores)

    def charge(self, tokens: int) -> None:
        """Count tokens that the teacher scored."""
        flops = 2.0 * self._teacher.parameters * tokens
        self.learner.charge(teacher_scored_tokens=tokens, flops=flops)

    def chunk_loss(
        self, batch: RolloutBatch, weights_N: torch.Tensor, tokens: TokenBatch
    ) -> ChunkLoss:
        """The loss of a micro-batch, on logits at temperature 1.

        Asks the teacher: call it before the model's own forward pass.
        """
        return distillation_loss(
            tokens.target_ids_T,
            batch.per_token(weights_N, tokens.row_T),
            self._teacher.targets(tokens),
            forward_weight=self._forward_weight,
            teacher_temperature=self.config.teacher_temperature,
            sampler_temperature=self.temperature,
            sampler_logprobs_T=batch.sampler_logprobs(tokens.rows, self.learner.device),
            importance_cap=self.config.importance_cap,
        )
