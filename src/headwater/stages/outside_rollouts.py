"""Rollouts of a teacher from outside the study, once, in the files that every reader knows.

A server is asked, batch by batch, and its answers are kept as they came: a stage that is stopped
asks for none again. Rollouts that are there already are checked and copied (`cached_teacher`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwater import seeding
from headwater.config.distillation import TopK
from headwater.config.stages import OutsideRolloutsStage
from headwater.config.teachers import CachedTeacher, OpenAITeacher
from headwater.models.loading import load_tokenizer
from headwater.plain_json import read_json_file
from headwater.rollout.openai_answers import OpenAIDialogue, Response
from headwater.rollout.openai_client import OpenAIClient
from headwater.stages.cached_teacher import copy_cached
from headwater.stages.job import METRICS, MetricsLog, StageContext, StageJob
from headwater.stages.ranks import of_main
from headwater.stages.rollout_files import ROLLOUT_IDS_SCHEMA, save_targets
from headwater.storage import write_whole
from headwater.tasks.prompts import encode_prompt
from headwater.types import FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(job: StageJob, context: StageContext) -> None:
    """Write rollouts.parquet and, where distributions are wanted, their files.

    `job.model_dir` has the tokenizer that they are written in. One rank does it for all.
    """
    context.world.from_main(lambda: _run(job, of_main(context)))


def _run(job: StageJob, context: StageContext) -> None:
    config = job.config
    assert isinstance(config, OutsideRolloutsStage) and job.model_dir is not None
    context.account.rewind(0)  # what is there already is charged again below
    tokenizer = load_tokenizer(job.model_dir)
    metrics = MetricsLog(job.output_dir / METRICS)
    if isinstance(config.teacher, CachedTeacher):
        metrics.write(0, copy_cached(job, config, Path(config.teacher.path), tokenizer))
    else:
        _ask(job, context, config.teacher, tokenizer, metrics)
    metrics.close()


def _ask(
    job: StageJob,
    context: StageContext,
    teacher: OpenAITeacher,
    tokenizer: PreTrainedTokenizerBase,
    metrics: MetricsLog,
) -> None:
    config = job.config
    assert isinstance(config, OutsideRolloutsStage)
    top_k = config.targets.k if isinstance(config.targets, TopK) else 0
    dialogue = OpenAIDialogue(teacher, tokenizer, job.prompt_form, config.sampling, top_k)
    client = OpenAIClient(teacher, os.environ.get(teacher.key_variable, ""))
    context.closing.callback(client.close)
    rows: list[dict[str, Any]] = []
    starts = range(0, len(job.problems), config.prompts_per_batch)
    for step, start in enumerate(starts):
        problems = job.problems[start : start + config.prompts_per_batch]
        began = time.perf_counter()
        batch = _batch(job, dialogue, client, problems, step)
        rows += batch.rows
        context.account.charge(**batch.charges, seconds=time.perf_counter() - began)
        metrics.write(step, batch.metrics)
        context.report_progress(
            {"stage": job.fingerprint, "kind": job.kind, "step": step + 1, "total": len(starts)}
            | batch.metrics
        )
        context.raise_if_stopped()
    table = pa.Table.from_pylist(rows, schema=ROLLOUT_IDS_SCHEMA)
    pq.write_table(table, job.output_dir / "rollouts.parquet")


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the answers to one batch of prompts came to."""

    rows: list[dict[str, Any]]
    charges: dict[str, float]
    metrics: dict[str, float]


def _batch(
    job: StageJob,
    dialogue: OpenAIDialogue,
    client: OpenAIClient,
    problems: Sequence[Problem],
    step: int,
) -> _Batch:
    """Ask about one batch, unless its answers are kept, and write its distributions."""
    config = job.config
    assert isinstance(config, OutsideRolloutsStage)
    count = config.rollouts_per_prompt
    kept = job.checkpoint_dir / f"answers-{step:05d}.json"
    if not kept.is_file():
        if step == 0:
            client.check_model()
        bodies = [dialogue.body(p, count, _seed(job, p)) for p in problems]
        write_whole(kept, json.dumps(client.ask(dialogue.path, bodies)))
    answers: list[Mapping[str, Any]] = read_json_file(kept)
    found: list[Response] = []
    rows = []
    for problem, answer in zip(problems, answers, strict=True):
        responses = dialogue.read(problem, count, answer)
        prompt_ids = encode_prompt(dialogue.tokenizer, problem, job.prompt_form)
        rows += [_row(job, step, problem, n, prompt_ids, r) for n, r in enumerate(responses)]
        found += responses
    if dialogue.top_k:
        _save_top(job.output_dir, step, found)
    tokens = sum(len(response.ids) for response in found)
    cut = sum(response.finish_reason is FinishReason.LENGTH for response in found)
    charges: dict[str, float] = {
        "prompts": len(problems),
        "generated_tokens": sum(map(_told_tokens, answers)) or tokens,
        "teacher_scored_tokens": tokens if dialogue.top_k else 0,
    }
    shape = {"response_tokens": tokens / len(found), "truncation_rate": cut / len(found)}
    return _Batch(rows, charges, shape)


def _seed(job: StageJob, problem: Problem) -> int:
    """A seed that servers take: 31 bits."""
    return seeding.derive_key(job.seed, job.stream, "sample", 0, problem.id) & 0x7FFFFFFF


def _told_tokens(answer: Mapping[str, Any]) -> int:
    """Generated tokens as the server counts, and bills, them; 0 where it does not say."""
    usage = answer.get("usage")
    told = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return told if isinstance(told, int) else 0


def _row(
    job: StageJob,
    step: int,
    problem: Problem,
    sample: int,
    prompt_ids: Sequence[int],
    response: Response,
) -> dict[str, Any]:
    return {
        "stage": job.fingerprint,
        "step": step,
        "problem_id": problem.id,
        "sample": sample,
        "prompt": problem.prompt,
        "response": response.text,
        "response_tokens": len(response.ids),
        "finish_reason": response.finish_reason.value,
        "prompt_ids": list(prompt_ids),
        "response_ids": list(response.ids),
    }


def _save_top(folder: Path, step: int, responses: Sequence[Response]) -> None:
    places = [place for response in responses for place in response.top]
    tensors = {
        "ids_TK": torch.tensor([ids for ids, _ in places], dtype=torch.int32),
        "logprobs_TK": torch.tensor([values for _, values in places], dtype=torch.float32),
    }
    save_targets(folder, step, [len(response.ids) for response in responses], tensors)
