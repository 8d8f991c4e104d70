"""Evaluation: k attempts at every problem, graded on an account of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from headwater.config.evaluation import Evaluation
from headwater.engine.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.evals.answers import votes_of
from headwater.evals.batches import FinishedBatches, Progress, write_table
from headwater.models.loading import load_tokenizer
from headwater.models.size import hidden_size
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.engines import Serving
from headwater.rollout.sampler import MAX_ROWS
from headwater.rollout.scoring import FrozenModel
from headwater.stages.job import METRICS, MetricsLog, StageContext, StageJob, metrics_hash
from headwater.stages.ranks import of_main
from headwater.stages.rollouts import RolloutBatch, RolloutSource
from headwater.types import FinishReason, Problem, Verdict
from headwater.verify.extract import ANSWER_FORMS, extract_first
from headwater.verify.grading import Grade
from headwater.verify.vault import Vault

ATTEMPTS_FILE = "attempts.parquet"
_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("attempt", pa.int32()),
        ("verdict", pa.string()),
        ("answer", pa.string()),
        ("vote", pa.int32()),
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

    Columns problem_id, attempt, verdict, answer (what was found in the response, null if
    nothing), vote (the first attempt that answered the same, null without answer),
    response_tokens, truncated, prompt, response, level, subject. Finished batches are kept: an
    interrupted evaluation goes on after the last of them.

    `options`: `verifier`, the verifier's name; `max_rows`, the most responses that are decoded at
    once.
    """
    keep_freed_memory()
    reset_peak_memory()
    config = job.config
    assert isinstance(config, Evaluation) and job.model_dir is not None
    assert context.vault is not None
    world = context.world
    keeper = _Keeper(job, of_main(context)) if world.is_main else None
    starts = world.from_main(lambda: _of(keeper).starts())
    device = resolve_device(job.compute)
    dtype = resolve_dtype(job.compute, device, hidden_size(job.model_dir))
    tokenizer = load_tokenizer(job.model_dir)
    model = FrozenModel.load(job.model_dir, device, dtype, usable_vocabulary(tokenizer))
    max_rows = job.options.get("max_rows", MAX_ROWS)
    source = RolloutSource(
        job,
        model.model,
        tokenizer,
        config.sampling,
        serving=Serving(job.model_dir, job.checkpoint_dir, context.closing),
        max_rows=max_rows,
        world=world,
    )
    for start in starts:
        began = time.perf_counter()
        problems = job.problems[start : start + config.batch_prompts]
        batch = RolloutBatch(tuple(source.draw(problems, config.attempts, 0)))
        texts = [source.text(r) for r in batch.rollouts]
        flops = 2.0 * model.parameters * int(batch.lengths_N.sum())
        world.from_main(partial(_close, keeper, batch, texts, flops, began))
        context.raise_if_stopped()
    world.from_main(lambda: _of(keeper).finish())
    context.account.observe_peak_memory(peak_memory_bytes())


class _Keeper:
    """What the main rank keeps: graded batches, metrics, and the account they are charged to."""

    def __init__(self, job: StageJob, context: StageContext) -> None:
        assert isinstance(job.config, Evaluation) and context.vault is not None
        self._job, self._context, self._config = job, context, job.config
        self._vault = context.vault
        self._finished = FinishedBatches(job.checkpoint_dir)
        progress = self._finished.load(job.problems, job.config.attempts)
        if not _is_vouched(progress, job, context):
            self._finished.clear()
            progress = Progress()
        context.account.rewind(progress.ledger_position)
        self._tables = list(progress.tables)
        self._problems = progress.problems
        self._metrics = MetricsLog(job.output_dir / METRICS, len(self._tables), progress.seconds)
        self._started = time.perf_counter() - progress.seconds

    def starts(self) -> range:
        """Places of the first problem of each batch still to do."""
        return range(self._problems, len(self._job.problems), self._config.batch_prompts)

    def close(self, batch: RolloutBatch, texts: Sequence[str], flops: float, began: float) -> None:
        """Grade and charge the next batch, and keep it; `began`: when its sampling did."""
        job, context, config = self._job, self._context, self._config
        problems = job.problems[self._problems :][: len(batch.groups)]
        ids = [problem.id for problem in problems for _ in range(config.attempts)]
        grades = self._vault.grade(context.account, list(zip(ids, texts, strict=True)))
        verdicts = [grade.verdict for grade in grades]
        rows = _rows(problems, config.attempts, batch, texts, verdicts)
        _add_answers(rows, config.attempts, grades, self._vault)
        step, tables = len(self._tables), self._tables
        tables.append(pa.Table.from_pylist(rows, schema=_SCHEMA))
        tokens = int(batch.lengths_N.sum())
        seconds = time.perf_counter() - began
        context.account.charge(
            prompts=len(problems),
            generated_tokens=tokens,
            flops=flops,
            seconds=seconds,
        )
        correct = sum(v is Verdict.CORRECT for v in verdicts) / len(verdicts)
        values = batch.shape_metrics() | {
            "pass_rate": correct,
            "longest_prompt_tokens": max(len(r.prompt_ids) for r in batch.rollouts),
            "tokens_per_second": tokens / seconds,
        }
        self._metrics.write(step, values)
        self._metrics.flush()
        vouched = metrics_hash(self._metrics.path, step + 1)
        spent = time.perf_counter() - self._started
        self._finished.add(step, tables[-1], context.account.position(), spent, vouched)
        context.report_progress(
            {
                "stage": job.fingerprint,
                "kind": job.kind,
                "step": step + 1,
                "total": step + len(self.starts()),
                "problems_done": self._problems + len(problems),
            }
            | values
        )
        self._problems += len(problems)

    def finish(self) -> None:
        """Write every attempt into one file."""
        self._metrics.close()
        write_table(pa.concat_tables(self._tables), self._job.output_dir / ATTEMPTS_FILE)


def _of(keeper: _Keeper | None) -> _Keeper:
    assert keeper is not None
    return keeper


def _close(
    keeper: _Keeper | None, batch: RolloutBatch, texts: Sequence[str], flops: float, began: float
) -> None:
    _of(keeper).close(batch, texts, flops, began)


def _is_vouched(progress: Progress, job: StageJob, context: StageContext) -> bool:
    """Whether metrics and ledger are those that the finished batches were kept with."""
    metrics = metrics_hash(job.output_dir / METRICS, len(progress.tables))
    return (
        not progress.tables or progress.metrics_sha256 == metrics
    ) and progress.ledger_position <= context.account.position()


def _rows(
    problems: Sequence[Problem],
    attempts: int,
    batch: RolloutBatch,
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
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


def _add_answers(
    rows: list[dict[str, Any]], attempts: int, grades: Sequence[Grade], vault: Vault
) -> None:
    """Fill in `answer` and `vote` of rows in the order of problems and attempts.

    A function says not what it read: its answers are looked for in every form.
    """
    forms = [form for form in ANSWER_FORMS if form in vault.reads]
    for row, grade in zip(rows, grades, strict=True):
        row["answer"] = grade.extracted or extract_first(row["response"], forms) or None
    for start in range(0, len(rows), attempts):
        rows_A = rows[start : start + attempts]
        votes_A = votes_of([row["answer"] for row in rows_A], vault.same_answers)
        for row, vote in zip(rows_A, votes_A, strict=True):
            row["vote"] = vote
