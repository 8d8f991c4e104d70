"""Teacher rollouts with the teacher's distributions, sampled once and read by every arm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from headwater.config.compute import VLLM
from headwater.config.distillation import FullVocabulary
from headwater.config.stages import TeacherRolloutsStage
from headwater.engine.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from headwater.engine.packing import micro_batches, pack
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.models.loading import load_tokenizer
from headwater.models.size import hidden_size
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.engines import Serving
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.teachers import Teacher, make_teacher, most_logprobs
from headwater.stages.job import MetricsLog, StageContext, StageJob
from headwater.stages.rollout_files import ROLLOUT_IDS_SCHEMA, save_targets
from headwater.stages.rollouts import RolloutBatch, RolloutSource, readable_rows
from headwater.types import FullTargets, Problem, TopKTargets

_SCORING_TOKENS = 16384


def run(job: StageJob, context: StageContext) -> None:
    """Sample `rollouts_per_prompt` responses to every prompt and keep what the teacher thought.

    Writes rollouts.parquet (with token ids), one targets-N.safetensors per batch of prompts
    (`offsets` [R + 1] and hidden_TH, or ids_TK and logprobs_TK), and head.safetensors.
    """
    keep_freed_memory()
    reset_peak_memory()
    config = job.config
    assert isinstance(config, TeacherRolloutsStage) and job.teacher_dir is not None
    context.account.rewind(0)  # batches are quick to redo, and equal when redone
    device = resolve_device(job.compute)
    dtype = resolve_dtype(job.compute, device, hidden_size(job.teacher_dir))
    tokenizer = load_tokenizer(job.teacher_dir)
    teacher = FrozenModel.load(job.teacher_dir, device, dtype, usable_vocabulary(tokenizer))
    serving = Serving(
        job.teacher_dir,
        job.checkpoint_dir,
        context.closing,
        max_logprobs=most_logprobs(config.targets),
    )
    source = RolloutSource(job, teacher.model, tokenizer, config.sampling, serving=serving)
    scorer = None
    if config.targets is not None and (context.world.is_main or not _is_served(job)):
        scorer = make_teacher(
            job.compute, serving, teacher.vocab_size, config.targets, local=teacher
        )
    world = context.world
    metrics = MetricsLog(job.output_dir / "metrics.jsonl") if world.is_main else None
    rows: list[dict[str, Any]] = []
    batches = range(0, len(job.problems), config.prompts_per_batch)
    at_once = 1 if _is_served(job) else world.size  # a batch for every rank, or for the servers'
    for first in range(0, len(batches), at_once):
        done = None
        if world.rank < at_once and first + world.rank < len(batches):
            start = batches[first + world.rank]
            problems = job.problems[start : start + config.prompts_per_batch]
            done = _batch(job, teacher, scorer, source, problems, first + world.rank)
        for step, one in enumerate(world.gather(done), first):
            if one is None:
                continue
            rows += one.rows
            context.account.charge(**one.charges)
            if metrics is not None:
                metrics.write(step, one.metrics)
            context.report_progress(
                {"stage": job.fingerprint, "kind": job.kind, "step": step + 1}
                | {"total": len(batches)}
                | one.metrics
            )
        context.raise_if_stopped()
    context.account.observe_peak_memory(peak_memory_bytes())
    if metrics is not None:
        metrics.close()
    world.from_main(lambda: _write(job, rows, teacher))  # however long it takes, all wait for it


def _write(job: StageJob, rows: Sequence[Mapping[str, Any]], teacher: FrozenModel) -> None:
    """What concerns all batches: rollouts, and the head that the hidden states belong to."""
    assert isinstance(job.config, TeacherRolloutsStage)
    table = pa.Table.from_pylist(list(rows), schema=ROLLOUT_IDS_SCHEMA)
    pq.write_table(table, job.output_dir / "rollouts.parquet")
    if isinstance(job.config.targets, FullVocabulary):
        save_file({"head_VH": teacher.head_VH.contiguous()}, job.output_dir / "head.safetensors")


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one batch of prompts came to: rows to keep, what it cost, how it looks."""

    rows: list[dict[str, Any]]
    charges: dict[str, float]
    metrics: dict[str, float]


def _is_served(job: StageJob) -> bool:
    return any(isinstance(one, VLLM) for one in (job.compute.rollouts, job.compute.scoring))


def _batch(
    job: StageJob,
    teacher: FrozenModel,
    scorer: Teacher | None,
    source: RolloutSource,
    problems: tuple[Problem, ...],
    step: int,
) -> _Batch:
    """Sample and score one batch, and write its targets."""
    config = job.config
    assert isinstance(config, TeacherRolloutsStage)
    began = time.perf_counter()
    batch = RolloutBatch(tuple(source.draw(problems, config.rollouts_per_prompt, 0)))
    scored = 0 if scorer is None else _score(job, teacher, scorer, batch, step)
    rows = _rows(job, step, batch, source, problems)
    tokens = int(batch.lengths_N.sum())
    seconds = time.perf_counter() - began
    return _Batch(
        rows,
        {
            "prompts": len(problems),
            "generated_tokens": tokens,
            "teacher_scored_tokens": scored,
            "flops": 2.0 * teacher.parameters * (tokens + scored),
            "seconds": seconds,
        },
        batch.shape_metrics() | {"tokens_per_second": tokens / seconds},
    )


def _score(
    job: StageJob,
    teacher: FrozenModel,
    scorer: Teacher,
    batch: RolloutBatch,
    step: int,
) -> int:
    """Write the teacher's distributions for one batch, rows in order; returns tokens scored."""
    scorer.prepare(scorer.ask(batch.rollouts))
    head = teacher.head_VH
    lengths = batch.lengths_N
    starts = [0, *torch.cumsum(lengths, 0).tolist()]
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    scored = 0
    for micro in micro_batches(batch.packed(), _SCORING_TOKENS):
        tokens = pack(micro, dtype=head.dtype, device=head.device)
        place = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in tokens.rows])
        found = scorer.targets(tokens)
        if isinstance(found, TopKTargets):
            parts.setdefault("ids_TK", []).append((place, found.ids_TK.int()))
            parts.setdefault("logprobs_TK", []).append((place, found.logprobs_TK))
        elif isinstance(found, FullTargets):
            parts.setdefault("hidden_TH", []).append((place, found.hidden_TH))
        scored += tokens.tokens
    tensors = {}
    for name, pieces in parts.items():
        first = pieces[0][1]
        whole = torch.empty((starts[-1], *first.shape[1:]), dtype=first.dtype)
        for place, values in pieces:
            whole[place] = values.cpu()
        tensors[name] = whole
    save_targets(job.output_dir, step, lengths.tolist(), tensors)
    return scored


def _rows(
    job: StageJob,
    step: int,
    batch: RolloutBatch,
    source: RolloutSource,
    problems: tuple[Problem, ...],
) -> list[dict[str, Any]]:
    texts = [source.text(r) for r in batch.rollouts]
    rows = readable_rows(job, step, batch, texts, problems)
    for row, rollout in zip(rows, batch.rollouts, strict=True):
        row["prompt_ids"] = list(rollout.prompt_ids)
        row["response_ids"] = list(rollout.response_ids)
    return rows
