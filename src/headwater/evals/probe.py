"""How far a student is from a teacher on the student's own rollouts (condition C2).

Nothing is trained and no answer is read. arXiv:2605.12483 asks that the two be close in KL
before on-policy distillation; the shared top tokens show it before the KL does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch

from headwater.config.recipe import Diagnostics
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from headwater.engine.packing import PackedGroup, TokenBatch, dealt, micro_batches, pack
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.divergences import distance
from headwater.models.loading import load_tokenizer
from headwater.models.size import hidden_size
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.engines import Serving
from headwater.rollout.scoring import FrozenModel
from headwater.stages.job import StageContext, StageJob
from headwater.stages.rollouts import RolloutBatch, RolloutSource
from headwater.storage import write_whole
from headwater.types import LossSums

#: Tokens whose overlap is looked at, as in the literature on on-policy distillation.
TOP_TOKENS = 16
_SCORING_TOKENS = 4096


def run(job: StageJob, context: StageContext) -> None:
    """Write probe.json: means over the tokens of fresh student rollouts, in all and by position.

    Keys forward_kl, reverse_kl, entropy, teacher_entropy (nats), top_overlap (share of the
    student's 16 likeliest tokens that are among the teacher's), overlap_mass (what the student
    gives to those), tokens; `positions` has the same for equal parts of each response.
    """
    keep_freed_memory()
    reset_peak_memory()
    config = job.config
    assert isinstance(config, Diagnostics)
    assert job.model_dir is not None and job.teacher_dir is not None
    context.account.rewind(0)
    began = time.perf_counter()
    device = resolve_device(job.compute)
    tokenizer = load_tokenizer(job.model_dir)
    vocabulary = usable_vocabulary(tokenizer)
    dtype = resolve_dtype(job.compute, device, hidden_size(job.model_dir))
    student = FrozenModel.load(job.model_dir, device, dtype, vocabulary)
    teacher = FrozenModel.load(job.teacher_dir, device, dtype, vocabulary)
    source = RolloutSource(
        job,
        student.model,
        tokenizer,
        config.sampling,
        serving=Serving(job.model_dir, job.checkpoint_dir, context.closing),
        world=context.world,
    )
    problems = job.problems[: config.prompts]
    batch = RolloutBatch(tuple(source.draw(problems, config.rollouts_per_prompt, 0)))
    totals = torch.zeros(config.positions, len(_MEASURES) + 1, dtype=torch.float64)
    for micro in micro_batches(dealt(batch.packed(), context.world), _SCORING_TOKENS):
        totals += _sums(micro, batch, student, teacher, config.positions, dtype)
    totals = torch.stack(context.world.gather(totals)).sum(0)
    context.raise_if_stopped()
    tokens = int(batch.lengths_N.sum())
    context.account.charge(
        prompts=len(problems),
        generated_tokens=tokens,
        teacher_scored_tokens=tokens,
        flops=2.0 * (2.0 * student.parameters + teacher.parameters) * tokens,
        seconds=time.perf_counter() - began,
    )
    found = _means(totals.sum(0)) | {"positions": [_means(row) for row in totals]}
    if context.world.is_main:
        write_whole(job.output_dir / "probe.json", json.dumps(found, indent=1) + "\n")
    context.account.observe_peak_memory(peak_memory_bytes())


_MEASURES = (
    "forward_kl",
    "reverse_kl",
    "entropy",
    "teacher_entropy",
    "top_overlap",
    "overlap_mass",
)


def _sums(
    micro: Sequence[PackedGroup],
    batch: RolloutBatch,
    student: FrozenModel,
    teacher: FrozenModel,
    positions: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums of every measure and the number of tokens for each part of a response: [positions, M+1].

    Token i of a response of n tokens lies in part floor(i * positions / n).
    """
    tokens = pack(micro, dtype=dtype, device=student.head_VH.device)
    part_T = _part_of(tokens, batch, positions)
    targets = teacher.targets(tokens)
    totals = torch.zeros(positions, len(_MEASURES) + 1, dtype=torch.float64)

    def measure(
        logits_CV: torch.Tensor, part: slice, wants_gradient: bool
    ) -> tuple[LossSums, None]:
        theirs_CV = (targets.hidden_TH[part] @ targets.head_VH.T).to(logits_CV.dtype)
        values = distance(theirs_CV, logits_CV, TOP_TOKENS)
        rows = torch.stack(
            [*(values[name] for name in _MEASURES), theirs_CV.new_ones(len(theirs_CV))], 1
        )
        totals.index_add_(0, part_T[part].cpu(), rows.double().cpu())
        return LossSums(logits_CV.new_zeros(()), 0.0), None

    with torch.no_grad():
        hidden = hidden_at_targets(student.model, tokens)
        chunked_head_loss(hidden, head_weight(student.model, student.vocab_size), measure)
    return totals


def _part_of(tokens: TokenBatch, batch: RolloutBatch, positions: int) -> torch.Tensor:
    """Which part of its response each target lies in: int64 [T]."""
    lengths = batch.lengths_N.tolist()
    return torch.tensor(
        [i * positions // lengths[row] for row in tokens.rows for i in range(lengths[row])]
    )


def _means(sums: torch.Tensor) -> dict[str, float]:
    *values, count = sums.tolist()
    means = {name: value / max(count, 1.0) for name, value in zip(_MEASURES, values, strict=True)}
    return means | {"tokens": count}
