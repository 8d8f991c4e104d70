"""Teacher rollouts that are there already, checked against a study and copied into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from headwater.config.distillation import FullVocabulary, TopK
from headwater.config.stages import OutsideRolloutsStage
from headwater.engine.cached_targets import CachedRollouts
from headwater.errors import InputError
from headwater.models.vocabulary import usable_vocabulary
from headwater.plain_json import read_json_file
from headwater.stages.job import StageJob
from headwater.stages.rollout_files import ROLLOUT_IDS_SCHEMA, save_targets
from headwater.storage import sha256_of, unsealed
from headwater.tasks.prompts import encode_prompt, encode_response
from headwater.types import FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = ("teacher_rollouts", "outside_rollouts")
_TOP = ("top_k_ids", "top_k_logprobs")
#: The mass of listed tokens may pass one by what float32 rounds.
_MASS_SLACK = 1e-3


def copy_cached(
    job: StageJob,
    config: OutsideRolloutsStage,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """Write the rollouts in `path` that the stage wants, and their distributions; returns metrics.

    path: another run's artifact, whose hashes and sampling are checked, or a .parquet file with
    the columns that docs/density.md has. Raises InputError for one that does not fit: other
    prompts, tokens, sampling or targets.
    """
    path = path.expanduser()
    cache = _Cache(path, config, tokenizer)
    chosen = cache.choose(job, config.rollouts_per_prompt)
    size = config.prompts_per_batch * config.rollouts_per_prompt
    rows: list[dict[str, Any]] = []
    for step, start in enumerate(range(0, len(chosen), size)):
        part = chosen[start : start + size]
        written = [cache.row(job, step, problem, sample, row) for problem, sample, row in part]
        rows += written
        if config.targets is not None:
            lengths = [one["response_tokens"] for one in written]
            tensors = cache.targets([row for _, _, row in part], written)
            save_targets(job.output_dir, step, lengths, tensors)
    table = pa.Table.from_pylist(rows, schema=ROLLOUT_IDS_SCHEMA)
    pq.write_table(table, job.output_dir / "rollouts.parquet")
    cache.copy_head(job.output_dir)
    lengths = [row["response_tokens"] for row in rows]
    cut = sum(row["finish_reason"] == FinishReason.LENGTH.value for row in rows)
    return {"response_tokens": sum(lengths) / len(rows), "truncation_rate": cut / len(rows)}


@dataclass
class _Cache:
    """Rows of a cache and what comes with them."""

    path: Path
    config: OutsideRolloutsStage
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self._artifact = self.path.is_dir()
        if self._artifact:
            _check_artifact(self.path, self.config)
        file = self.path / "rollouts.parquet" if self._artifact else self.path
        try:
            self._rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: cannot be read ({error}); give a .parquet file") from None
        missing = {"prompt", "response"} - (self._rows[0].keys() if self._rows else set())
        if missing:
            raise InputError(
                f"{file}: lacks the columns {sorted(missing)}; expected prompt and response, a row "
                "for each rollout; see docs/density.md"
            )
        if not self._artifact and isinstance(self.config.targets, FullVocabulary):
            raise InputError(
                f"{file}: targets: full of a file, which lists the likeliest tokens at most; "
                "expected an artifact of a run; set targets: {kind: top_k, k: 20}, or use "
                "sample_sft"
            )
        self._vocabulary = usable_vocabulary(self.tokenizer)
        self._cached = CachedRollouts(self.path) if self._artifact else None

    def choose(self, job: StageJob, count: int) -> list[tuple[Problem, int, dict[str, Any]]]:
        """The first `count` rollouts of each problem: (problem, sample, row with its "place").

        Problems that end in the same question after other messages are told apart by prompt_ids.
        """
        problems = job.problems
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for place, row in enumerate(self._rows):
            found[row["prompt"]].append({**row, "place": place})
        befores: dict[str, set[tuple[tuple[str, str], ...]]] = defaultdict(set)
        for problem in problems:
            befores[problem.prompt].add(problem.before)

        def rows_of(problem: Problem) -> list[dict[str, Any]]:
            rows = found.get(problem.prompt, [])
            if len(befores[problem.prompt]) == 1:
                return rows
            ids = encode_prompt(self.tokenizer, problem, job.prompt_form)
            return [row for row in rows if row.get("prompt_ids") == ids]

        own = {problem.id: rows_of(problem) for problem in problems}
        short = [p for p in problems if len(own[p.id]) < count]
        if short:
            has = len(own[short[0].id])
            raise InputError(
                f"{self.path}: {has} rollouts of problem {short[0].id!r} and of {len(short) - 1} "
                f"others fewer than wanted; expected {count} of each of the pool's {len(problems)} "
                "problems; name the pool they were made for, or lower teacher_rollouts_per_prompt"
            )
        return [(p, n, row) for p in problems for n, row in enumerate(own[p.id][:count])]

    def row(
        self, job: StageJob, step: int, problem: Problem, sample: int, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A row of rollouts.parquet. Raises InputError for tokens that are not the student's."""
        prompt_ids = encode_prompt(self.tokenizer, problem, job.prompt_form)
        if found.get("prompt_ids") not in (None, prompt_ids):
            raise InputError(
                f"{self.path}: the prompt of problem {problem.id!r} has other tokens there; "
                "expected those of the student's tokenizer and chat template and of task.prompt; "
                "use rollouts of a teacher of the student's family, and the same task.prompt"
            )
        text, response_ids = str(found["response"]), found.get("response_ids")
        cut = found.get("finish_reason") == FinishReason.LENGTH.value
        if response_ids is None:
            response_ids = encode_response(self.tokenizer, problem, text)
            response_ids = response_ids[:-1] if cut else response_ids
        elif (
            not response_ids
            or max(response_ids) >= self._vocabulary
            or min(response_ids) < 0
            or self.tokenizer.decode(response_ids, skip_special_tokens=True) != text
        ):
            raise InputError(
                f"{self.path}: response_ids of problem {problem.id!r} do not spell its response "
                f"{text[:60]!r} in the student's tokens; expected one tokenizer; leave out the "
                "column for samples of another family's teacher"
            )
        if len(response_ids) > self.config.sampling.max_new_tokens:
            raise InputError(
                f"{self.path}: a response of {len(response_ids)} tokens to problem {problem.id!r}; "
                f"expected at most max_new_tokens={self.config.sampling.max_new_tokens}; raise it"
            )
        return {
            "stage": job.fingerprint,
            "step": step,
            "problem_id": problem.id,
            "sample": sample,
            "prompt": problem.prompt,
            "response": text,
            "response_tokens": len(response_ids),
            "finish_reason": (FinishReason.LENGTH if cut else FinishReason.STOP).value,
            "prompt_ids": prompt_ids,
            "response_ids": list(response_ids),
        }

    def targets(
        self, found: Sequence[Mapping[str, Any]], written: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """The distributions of rows, as files keep them."""
        targets = self.config.targets
        if self._cached is not None:
            stored = self._cached.stored([row["place"] for row in found])
            if isinstance(targets, TopK):
                return {name: part[:, : targets.k].contiguous() for name, part in stored.items()}
            return stored
        assert isinstance(targets, TopK)
        return self._listed(targets, found, written)

    def _listed(
        self,
        targets: TopK,
        found: Sequence[Mapping[str, Any]],
        written: Sequence[Mapping[str, Any]],
    ) -> dict[str, torch.Tensor]:
        """top_k_ids and top_k_logprobs of a user's file, likeliest first, [T, k]."""
        all_ids: list[list[int]] = []
        all_logprobs: list[list[float]] = []
        for row, own in zip(found, written, strict=True):
            ids, logprobs = (row.get(name) or [] for name in _TOP)
            if len(ids) != own["response_tokens"] or len(logprobs) != len(ids):
                raise InputError(
                    f"{self.path}: {_TOP[0]} and {_TOP[1]} of problem {own['problem_id']!r} have "
                    f"{len(ids)} and {len(logprobs)} places; expected one for each of its "
                    f"{own['response_tokens']} response_ids; see docs/density.md"
                )
            for place in zip(ids, logprobs, strict=True):
                ranked = self._ranked(*place, targets.k, own["problem_id"])
                all_ids.append([token for token, _ in ranked])
                all_logprobs.append([value for _, value in ranked])
        return {
            "ids_TK": torch.tensor(all_ids, dtype=torch.int32),
            "logprobs_TK": torch.tensor(all_logprobs, dtype=torch.float32),
        }

    def _ranked(
        self, ids: Sequence[int], logprobs: Sequence[float], k: int, problem: str
    ) -> list[tuple[int, float]]:
        """The k likeliest tokens of one place. Raises InputError for what is no distribution."""
        mass = float(torch.tensor(list(logprobs), dtype=torch.float64).exp().sum())
        known = all(0 <= token < self._vocabulary for token in ids)
        sound = len(ids) == len(set(ids)) == len(logprobs) and known and mass <= 1 + _MASS_SLACK
        if not sound or len(ids) < k:
            raise InputError(
                f"{self.path}: a place of problem {problem!r} lists {len(ids)} tokens with a mass "
                f"of {mass:.4f}; expected at least {k} different ids of the student's "
                f"{self._vocabulary} tokens and their log-probabilities in nats, whose mass is at "
                "most 1; correct the file, or lower targets.k"
            )
        return sorted(zip(ids, logprobs, strict=True), key=lambda one: -one[1])[:k]

    def copy_head(self, folder: Path) -> None:
        """The head that hidden states belong to, cut to the student's tokens."""
        if not isinstance(self.config.targets, FullVocabulary):
            return
        head = load_file(self.path / "head.safetensors")["head_VH"]
        if head.shape[0] != self._vocabulary:
            raise InputError(
                f"{self.path}: the teacher's head has {head.shape[0]} tokens, the student "
                f"{self._vocabulary}; expected one tokenizer; use a teacher of the student's family"
            )
        save_file({"head_VH": head}, folder / "head.safetensors")


def _check_artifact(path: Path, config: OutsideRolloutsStage) -> None:
    """Whether an artifact is whole, and what the stage wants. Raises InputError."""
    try:
        manifest = unsealed(read_json_file(path / "manifest.json"))
        files, made = manifest["files"], manifest["config"]
        kind, targets, sampling = manifest["kind"], made.get("targets"), made.get("sampling")
        damaged = [name for name, one in files.items() if sha256_of(path / name) != one["sha256"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: its manifest cannot be believed ({error}); expected an artifact as a run "
            "left it; copy it again, whole"
        ) from None
    if kind not in _KINDS:
        raise InputError(
            f"{path}: an artifact of {kind}; expected one of {' or '.join(_KINDS)}; name another"
        )
    if damaged:
        raise InputError(
            f"{path}: {damaged[0]} differs from its recorded hash; expected an artifact as a run "
            "left it; copy it again, whole"
        )
    wanted = config.sampling.model_dump(mode="json")
    if sampling != wanted:
        raise InputError(
            f"{path}: drawn with sampling {_written(sampling)}; expected {_written(wanted)}, as "
            f"the stage's settings say; set sampling: {_written(sampling)} in the stage"
        )
    if config.targets is None:
        return
    needed = config.targets.model_dump(mode="json")
    has = targets or {}
    enough = has.get("kind") == needed["kind"] and has.get("k", 0) >= needed.get("k", 0)
    if not enough:
        raise InputError(
            f"{path}: has targets {_written(targets)}; expected {_written(needed)}, as the stage's "
            "settings say; "
            + (f"set targets: {_written(targets)} in the stage" if targets else "use sample_sft")
        )


def _written(settings: Mapping[str, Any] | None) -> str:
    """Settings as a recipe has them."""
    if not settings:
        return "none"
    return f"{{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}"
