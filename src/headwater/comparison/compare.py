"""`headwater eval`: k attempts of each model at the same problems, and what tells them apart."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from headwater.comparison.candidates import (
    Candidate,
    candidates,
    check_reads,
    fetch,
    forget_weights,
    known_facts,
)
from headwater.comparison.folder import (
    Attempts,
    EvaluationFolder,
    default_folder,
    versions,
)
from headwater.comparison.record import (
    Comparison,
    EvaluatedModel,
    PairedComparison,
    SetComparison,
)
from headwater.comparison.settings import EvaluationSettings, ProblemSet, read_sets
from headwater.config.evaluation import Evaluation
from headwater.errors import InputError, Interrupted
from headwater.evals import statistics
from headwater.evals.batches import FinishedBatches
from headwater.evals.scores import score
from headwater.ledger import Ledger
from headwater.stages.job import StageContext, StageJob
from headwater.storage import disk_errors
from headwater.tasks.prompts import check_prompt_matches_verifier
from headwater.tasks.readings import Reading
from headwater.types import Problem
from headwater.verify.grading import Verifier
from headwater.verify.vault import LabelVault
from headwater.verify.verifiers import accepts_examples, make_verifier, reads_rows
from headwater.workflow.store import run_lock

#: Responses that are decoded at once: where more no longer pays, as measured in docs/log.md.
_ROWS = {"cpu": 64, "cuda": 512}
#: A batch holds so many times the rows; a row that ends is replaced while there are more.
_BATCH_ROUNDS = 2
_MOST_GRADERS = 4


@dataclass(frozen=True, slots=True)
class BatchDone:
    """How far one model is on one set: problems done, and how the last batch went.

    seconds_left: of this evaluation, as it went so far.
    """

    model: str
    set_name: str
    done: int
    problems: int
    pass_rate: float
    tokens_per_second: float
    seconds_left: float


OnBatch = Callable[[BatchDone], None]


def compare_models(
    models: Sequence[str],
    settings: EvaluationSettings,
    out_dir: Path | None = None,
    *,
    on_batch: OnBatch | None = None,
) -> Comparison:
    """Evaluate models on every set of problems, and compare them problem by problem.

    models: folders, or sources such as hf:ID, either as NAME=MODEL too. out_dir: where attempts
    are kept, by default runs/eval/MODEL-SET-HASH. What it holds finished is read back, what was
    begun there is continued. on_batch: told after each batch.

    Raises InputError for models, problems or settings that cannot work, before anything is
    sampled, and for a folder that was begun with other settings; Interrupted after Ctrl-C.
    """
    chosen = candidates(models, settings.seed)
    sets = read_sets(settings)
    out = default_folder(chosen, settings, sets) if out_dir is None else out_dir
    try:
        with disk_errors(out), run_lock(out):
            folder = EvaluationFolder(out, settings, sets)
            return _compare(chosen, settings, sets, folder, on_batch)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; every finished batch is in {out}: the same command continues there"
        ) from None


def _compare(
    chosen: Sequence[Candidate],
    settings: EvaluationSettings,
    sets: Mapping[str, ProblemSet],
    folder: EvaluationFolder,
    on_batch: OnBatch | None,
) -> Comparison:
    to_do = {
        candidate: [name for name in sets if not folder.is_finished(candidate, name)]
        for candidate in chosen
    }
    open_count = sum(map(len, to_do.values()))
    if open_count:
        _evaluate_all(to_do, settings, sets, folder, on_batch)
    attempts = {
        (one.name, name): folder.attempts(one, name, settings.seed)
        for name in sets
        for one in chosen
    }
    found = Comparison(
        settings=settings,
        models=tuple(_facts(one, folder, next(iter(sets))) for one in chosen),
        sets=_sets([one.name for one in chosen], sets, attempts),
        versions=versions(),
        out=folder.out,
        read_back=len(chosen) * len(sets) - open_count,
    )
    folder.write(found, sets, attempts)
    return found


def _evaluate_all(
    to_do: Mapping[Candidate, Sequence[str]],
    settings: EvaluationSettings,
    sets: Mapping[str, ProblemSet],
    folder: EvaluationFolder,
    on_batch: OnBatch | None,
) -> None:
    """Make every attempt that is not made yet; all models are checked before one samples."""
    open_sets = dict.fromkeys(name for names in to_do.values() for name in names)
    graders = min(os.cpu_count() or 1, _MOST_GRADERS)
    with make_verifier(settings.verifier, workers=graders) as verifier:
        for name in open_sets:
            _check_prompt(settings, verifier, sets[name])
        paths = _fetch_all(to_do, settings, sets, folder)
        for candidate, path in paths.items():
            for name in to_do[candidate]:
                job = _job(candidate, path, name, settings, sets[name].data.problems, folder)
                _evaluate(job, (candidate.name, name), sets[name], verifier, on_batch)
            forget_weights(folder.model(candidate))


def _fetch_all(
    to_do: Mapping[Candidate, Sequence[str]],
    settings: EvaluationSettings,
    sets: Mapping[str, ProblemSet],
    folder: EvaluationFolder,
) -> dict[Candidate, Path]:
    """Folders of the models that have something to do and can read it."""
    paths = {}
    try:
        for candidate, names in to_do.items():
            if names:
                paths[candidate], _ = fetch(candidate, folder.model(candidate))
                readings = [_reading(name, sets[name], settings) for name in names]
                check_reads(candidate, paths[candidate], settings.prompt, readings)
    except InputError:  # nobody will continue this
        for candidate in to_do:
            forget_weights(folder.model(candidate))
        raise
    return paths


def _check_prompt(settings: EvaluationSettings, verifier: Verifier, asked: ProblemSet) -> None:
    if reads_rows(settings.verifier):
        return
    accepted = accepts_examples(verifier, settings.prompt, asked.data.labels)
    check_prompt_matches_verifier(settings.prompt, verifier.reads, verifier.name, accepted)


def _reading(name: str, asked: ProblemSet, settings: EvaluationSettings) -> Reading:
    return Reading(name, asked.data.problems, settings.sampling.max_new_tokens)


def _job(
    candidate: Candidate,
    model_dir: Path,
    set_name: str,
    settings: EvaluationSettings,
    problems: tuple[Problem, ...],
    folder: EvaluationFolder,
) -> StageJob:
    """What one model is to do on one set, in a folder that agrees. Loads torch."""
    how = _how(settings, model_dir)
    output = folder.begin(candidate, set_name, how)
    batch_prompts = max(1, _BATCH_ROUNDS * how["rows"] // settings.attempts)
    return StageJob(
        kind="evaluate",
        config=Evaluation(
            attempts=settings.attempts, sampling=settings.sampling, batch_prompts=batch_prompts
        ),
        fingerprint=f"{candidate.folder_name}/{set_name}",
        seed=settings.seed,
        stream="evaluate",
        problems=problems,
        prompt_form=settings.prompt,
        sampling=settings.sampling,
        compute=settings.compute,
        output_dir=output,
        checkpoint_dir=output / "batches",
        model_dir=model_dir,
        options={"max_rows": how["rows"]},
    )


def _how(settings: EvaluationSettings, model_dir: Path) -> dict[str, Any]:
    """Device, precision, threads and rows: what shows in the last bits."""
    from headwater.engine.precision import resolve_device, resolve_dtype, settle_threads
    from headwater.models.size import hidden_size

    device = resolve_device(settings.compute)
    dtype = resolve_dtype(settings.compute, device, hidden_size(model_dir))
    return {
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
        "threads": settle_threads(settings.compute.threads),
        "rows": settings.rows or _ROWS[device.type],
    }


def _evaluate(
    job: StageJob,
    names: tuple[str, str],
    asked: ProblemSet,
    verifier: Verifier,
    on_batch: OnBatch | None,
) -> None:
    """Sample and grade one model on one set, `names`, from where it was left."""
    from headwater.evals import attempts

    config = job.config
    assert isinstance(config, Evaluation)
    before = FinishedBatches(job.checkpoint_dir).load(job.problems, config.attempts).problems
    started = time.monotonic()

    def tell(values: Mapping[str, Any]) -> None:
        if on_batch is None:
            return
        done, problems = values["problems_done"], len(job.problems)
        left = (time.monotonic() - started) / (done - before) * (problems - done)
        rates = values["pass_rate"], values["tokens_per_second"]
        on_batch(BatchDone(*names, done, problems, *rates, left))

    with Ledger(job.output_dir / "ledger.sqlite") as ledger:
        context = StageContext(
            account=ledger.account(job.fingerprint, "eval"),
            vault=LabelVault(asked.data.labels, verifier),
            report_progress=tell,
            stop_requested=lambda: False,
        )
        with context.closing:
            attempts.run(job, context)
    shutil.rmtree(job.checkpoint_dir)


def _facts(candidate: Candidate, folder: EvaluationFolder, set_name: str) -> EvaluatedModel:
    facts = known_facts(folder.model(candidate))
    assert facts is not None
    how = folder.how(candidate, set_name)
    return EvaluatedModel(
        name=candidate.name,
        source=candidate.source,
        sha256=facts.sha256,
        weights=dict(facts.weights),
        **how,
    )


def _sets(
    models: Sequence[str],
    sets: Mapping[str, ProblemSet],
    attempts: Mapping[tuple[str, str], Attempts],
) -> tuple[SetComparison, ...]:
    pairs = list(combinations(models, 2))
    found = {
        (name, *pair): statistics.paired_difference(
            *(attempts[model, name].table.correct for model in pair)
        )
        for name in sets
        for pair in pairs
    }
    p_values = statistics.holm([difference.p_value for difference in found.values()])
    corrected = dict(zip(found, p_values, strict=True))
    return tuple(
        SetComparison(
            name=name,
            source=asked.source,
            sha256=asked.data.data_hash,
            problems=len(asked.data),
            available=asked.available,
            scores=tuple(
                score(attempts[model, name].table, asked.data.problems) for model in models
            ),
            differences=tuple(
                PairedComparison(*pair, found[name, *pair], corrected[name, *pair])
                for pair in pairs
            ),
        )
        for name, asked in sets.items()
    )
