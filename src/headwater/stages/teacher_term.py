"""What a teacher says of a step's rollouts: a divergence at every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.config.compute import VLLM
from headwater.config.distillation import Divergence, MixedKL
from headwater.config.stages import MixedStage, OPDStage
from headwater.engine.packing import PackedGroup, TokenBatch
from headwater.losses.chunked_head import ChunkLoss
from headwater.losses.token_losses import distillation_loss
from headwater.rollout.engines import Serving
from headwater.rollout.teachers import ServedRows, make_teacher, most_logprobs
from headwater.stages.ahead import Score
from headwater.stages.learner import Learner
from headwater.stages.rollouts import RolloutBatch
from headwater.types import Problem, TeacherTargets


def forward_weight(divergence: Divergence) -> float:
    """Weight of the forward KL in a divergence: 1 forward, 0 reverse, between for mixed."""
    if isinstance(divergence, MixedKL):
        return divergence.forward_weight
    return 1.0 if divergence.kind == "forward" else 0.0


class TeacherTerm:
    """The distillation loss of a stage on its own rollouts, each scored by its problem's teacher.

    temperature: of those rollouts. local: the teachers where this process has them. score: asks
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
        folders = list(dict.fromkeys((job.teacher_dir, *job.teachers.values())))
        self._number = {source: folders.index(path) for source, path in job.teachers.items()}
        self.local = () if served else tuple(learner.frozen(folder) for folder in folders)
        self._teachers = [
            make_teacher(
                job.compute,
                Serving(
                    folder,
                    job.checkpoint_dir,
                    learner.context.closing,
                    max_logprobs=most_logprobs(config.targets),
                ),
                learner.vocab_size,
                config.targets,
                config.teacher_temperature,
                local=self.local[number] if self.local else None,
                is_main=learner.world.is_main,
            )
            for number, folder in enumerate(folders)
        ]
        self.score: Score | None = self._teachers[0].ask if served else None

    def numbers(self, problems: Sequence[Problem]) -> list[int]:
        """The number of each problem's teacher, for `RolloutBatch.packed`."""
        return [self._number.get(problem.source, 0) for problem in problems]

    def prepare(self, scores: ServedRows | None) -> None:
        """Keep what `score` said of the rollouts that come next."""
        self._teachers[0].prepare(scores)  # servers hold one

    def charge(self, groups: Sequence[PackedGroup]) -> None:
        """Count what the teachers scored."""
        for number, teacher in enumerate(self._teachers):
            tokens = sum(group.tokens for group in groups if group.teacher == number)
            flops = 2.0 * teacher.parameters * tokens
            self.learner.charge(teacher_scored_tokens=tokens, flops=flops)

    def chunk_loss(
        self,
        batch: RolloutBatch,
        weights_N: torch.Tensor,
        micro: Sequence[PackedGroup],
        tokens: TokenBatch,
    ) -> ChunkLoss:
        """The loss of a micro-batch, on logits at temperature 1.

        Asks the teacher: call it before the model's own forward pass.
        """
        return distillation_loss(
            tokens.target_ids_T,
            batch.per_token(weights_N, tokens.row_T),
            self._targets(micro[0].teacher, tokens),
            forward_weight=self._forward_weight,
            teacher_temperature=self.config.teacher_temperature,
            sampler_temperature=self.temperature,
            sampler_logprobs_T=batch.sampler_logprobs(tokens.rows, self.learner.device),
            importance_cap=self.config.importance_cap,
        )

    def _targets(self, number: int, tokens: TokenBatch) -> TeacherTargets:
        """What a teacher thinks. Ranks may have micro-batches of different ones, so that each goes
        through all of them, in their order."""
        if self.learner.world.size > 1:
            for model in self.local[:number]:
                self.learner.idle_beside(model)
        found = self._teachers[number].targets(tokens)
        if self.learner.world.size > 1:
            for model in self.local[number + 1 :]:
                self.learner.idle_beside(model)
        return found
