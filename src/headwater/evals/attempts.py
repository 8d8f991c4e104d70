"""Evaluation: k attempts at every problem, graded on an account of its own."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headwater.config.recipe import Evaluation
from headwater.engine.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.models.loading import load_tokenizer
from headwater.models.size import hidden_size
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.scoring import FrozenModel
from headwater.stages.job import MetricsLog, StageContext, StageJob
from headwater.stages.rollouts import RolloutBatch, RolloutSource
from headwater.types import FinishReason, Problem, Verdict

_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("attempt", pa.int32()),
        ("verdict", pa.string()),
        ("response_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("level", pa.int32()),
        ("subject", pa.string()),
    ]
)


def run(job: StageJob, context: StageContext) -> None:
    """Write attempts.parquet: one row per problem and attempt, in the problems' order.

    Columns problem_id, attempt, verdict, response_tokens, truncated, prompt, response, level,
    subject. An interrupted evaluation begins again; its samples are the same.
    """
    keep_freed_memory()
    reset_peak_memory()
    config = job.config
    assert isinstance(config, Evaluation) and job.model_dir is not None
    assert context.vault is not None
    context.account.rewind(0)
    device = resolve_device(job.compute)
    dtype = resolve_dtype(job.compute, device, hidden_size(job.model_dir))
    tokenizer = load_tokenizer(job.model_dir)
    model = FrozenModel.load(job.model_dir, device, dtype, usable_vocabulary(tokenizer))
    source = RolloutSource(job, model.model, tokenizer, config.sampling)
    metrics = MetricsLog(job.output_dir / "metrics.jsonl")
    rows: list[dict[str, Any]] = []
    starts = range(0, len(job.problems), config.batch_prompts)
    for step, start in enumerate(starts):
        began = time.perf_counter()
        problems = job.problems[start : start + config.batch_prompts]
        batch = RolloutBatch(tuple(source.draw(problems, config.attempts, 0)))
        texts = [source.text(r) for r in batch.rollouts]
        ids = [problem.id for problem in problems for _ in range(config.attempts)]
        grades = context.vault.grade(context.account, list(zip(ids, texts, strict=True)))
        verdicts = [grade.verdict for grade in grades]
        rows += _rows(problems, config.attempts, batch, texts, verdicts)
        tokens = int(batch.lengths_N.sum())
        seconds = time.perf_counter() - began
        context.account.charge(
            prompts=len(problems),
            generated_tokens=tokens,
            flops=2.0 * model.parameters * tokens,
            seconds=seconds,
        )
        correct = sum(v is Verdict.CORRECT for v in verdicts) / len(verdicts)
        values = batch.shape_metrics() | {
            "pass_rate": correct,
            "tokens_per_second": tokens / seconds,
        }
        metrics.write(step, values)
        context.report_progress(
            {"stage": job.fingerprint, "kind": job.kind, "step": step + 1, "total": len(starts)}
            | values
        )
        context.raise_if_stopped()
    metrics.close()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    pq.write_table(table, job.output_dir / "attempts.parquet")
    context.account.observe_peak_memory(peak_memory_bytes())


def _rows(
    problems: tuple[Problem, ...],
    attempts: int,
    batch: RolloutBatch,
    texts: list[str],
    verdicts: list[Verdict],
) -> list[dict[str, Any]]:
    rows = []
    for n, rollout in enumerate(batch.rollouts):
        problem = problems[n // attempts]
        rows.append(
            {
                "problem_id": problem.id,
                "attempt": n % attempts,
                "verdict": verdicts[n].value,
                "response_tokens": len(rollout.response_ids),
                "truncated": rollout.finish_reason is FinishReason.LENGTH,
                "prompt": problem.prompt,
                "response": texts[n],
                "level": problem.level,
                "subject": problem.subject,
            }
        )
    return rows
