"""`headwater eval`: k attempts of each model at the same problems, and what tells them apart."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from pydantic import Field, PositiveInt

from headwater.config.base import Settings
from headwater.config.evaluation import Evaluation
from headwater.config.recipe import Compute
from headwater.config.stages import Sampling
from headwater.errors import InputError
from headwater.evals import statistics
from headwater.ledger import Ledger
from headwater.models.source_names import SourceKind, describe_source, require_available
from headwater.stages.job import StageContext, StageJob
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.tasks.prompts import check_prompt_matches_verifier
from headwater.tasks.readings import Reading
from headwater.types import AttemptTable, Verdict
from headwater.verify.extract import ANSWER_FORMS, extract_first
from headwater.verify.vault import LabelVault
from headwater.verify.verifiers import Verifier, accepts_examples, make_verifier
from headwater.workflow.outcome import read_attempts


class EvaluationSettings(Settings):
    """What every model is asked, and how; `limit` takes the first problems only."""

    problems: str
    attempts: PositiveInt = 16
    verifier: str = "math"
    prompt: str = "boxed"
    limit: PositiveInt | None = None
    sampling: Sampling = Sampling()
    seed: int = 0
    compute: Compute = Field(default_factory=Compute)


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's scores; k is the number of attempts. Shares are of all attempts."""

    model: str
    avg_at_k: statistics.Estimate
    pass_at_k: statistics.Estimate
    maj_at_k: statistics.Estimate
    truncated_share: float
    unparseable_share: float
    timeout_share: float
    mean_response_tokens: float


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """avg@k of `first` minus that of `second`; the p-value is corrected over all pairs (Holm)."""

    first: str
    second: str
    difference: statistics.Difference
    p_value_corrected: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of every model and the difference of every pair."""

    settings: EvaluationSettings
    problems: int
    scores: tuple[ModelScore, ...]
    differences: tuple[PairedComparison, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "problems": self.problems,
            "scores": [_json_values(asdict(score)) for score in self.scores],
            "differences": [_json_values(asdict(pair)) for pair in self.differences],
        }


def _json_values(plain: dict[str, Any]) -> dict[str, Any]:
    """None where JSON has no number: the error over one problem, infinite degrees of freedom."""
    return {key: _json_value(value) for key, value in plain.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _json_values(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


#: Told the model, the batches done, and how many there are.
OnBatch = Callable[[str, int, int], None]


def compare_models(
    models: Sequence[str],
    settings: EvaluationSettings,
    out_dir: Path | None = None,
    *,
    on_batch: OnBatch | None = None,
) -> Comparison:
    """Evaluate model folders (or sources such as hf:ID) and compare them problem by problem.

    out_dir: keeps attempts.parquet of each model in out_dir/NUMBER-NAME; a temporary folder by
    default. on_batch: told after each batch of problems. Raises InputError for models, problems
    or settings that cannot work, before anything is sampled.
    """
    repeated = sorted({model for model in models if models.count(model) > 1})
    if repeated:
        raise InputError(f"{', '.join(repeated)}: given twice; name each model once")
    for model in models:
        _check_model(model)
    data = _problems(settings)
    with make_verifier(settings.verifier) as verifier, _folder(out_dir) as folder:
        accepted = accepts_examples(verifier, settings.prompt, data.labels)
        check_prompt_matches_verifier(settings.prompt, verifier.reads, verifier.name, accepted)
        paths = [
            _attempts(
                model, folder / f"{number}-{Path(model).name}", settings, data, verifier, on_batch
            )
            for number, model in enumerate(models)
        ]
        tables = [read_attempts([path], (settings.seed,)) for path in paths]
        scores = tuple(
            _score(model, table, path, verifier)
            for model, table, path in zip(models, tables, paths, strict=True)
        )
    return Comparison(settings, len(data), scores, _differences(models, tables))


def _check_model(model: str) -> None:
    """A folder with a config.json, or the name of a source that is to be had."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{model} has no config.json; give a Hugging Face folder, such as "
                "RUN/artifacts/FINGERPRINT/model"
            )
        return
    try:
        source = describe_source(model)
    except InputError as error:
        raise InputError(f"{model}: no such folder, and {error}") from None
    if source.kind is SourceKind.PRUNE:
        raise InputError(f"{model}: only a recipe knows the parent; give the pruned model's folder")
    require_available(model)


def _problems(settings: EvaluationSettings) -> LabelledProblems:
    data = load_problems(settings.problems)
    if settings.limit is None:
        return data
    first = {problem.id for problem in data.problems[: settings.limit]}
    return data.only(lambda problem: problem.id in first)


@contextmanager
def _folder(out_dir: Path | None) -> Iterator[Path]:
    if out_dir is None:
        with tempfile.TemporaryDirectory(prefix="headwater-eval-") as name:
            yield Path(name)
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        yield out_dir


def _attempts(
    model: str,
    folder: Path,
    settings: EvaluationSettings,
    data: LabelledProblems,
    verifier: Verifier,
    on_batch: OnBatch | None,
) -> Path:
    """Sample and grade one model; returns its attempts.parquet. Loads torch."""
    from headwater.evals import attempts
    from headwater.models.context_length import check_context
    from headwater.models.sources import materialise

    model_dir = Path(model)
    if not model_dir.is_dir():
        model_dir = folder / "model"
        materialise(model, model_dir, seed=settings.seed)
    reading = Reading(settings.problems, data.problems, settings.sampling.max_new_tokens)
    check_context(model_dir, model, settings.prompt, [reading])
    job = StageJob(
        kind="evaluate",
        config=Evaluation(attempts=settings.attempts, sampling=settings.sampling),
        fingerprint=folder.name,
        seed=settings.seed,
        stream="evaluate",
        problems=data.problems,
        prompt_form=settings.prompt,
        sampling=settings.sampling,
        compute=settings.compute,
        output_dir=folder,
        checkpoint_dir=folder / "checkpoint",
        model_dir=model_dir,
    )

    def tell(values: Mapping[str, Any]) -> None:
        if on_batch is not None:
            on_batch(model, values["step"], values["total"])

    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        context = StageContext(
            account=ledger.account(folder.name, "eval"),
            vault=LabelVault(data.labels, verifier),
            report_progress=tell,
            stop_requested=lambda: False,
        )
        attempts.run(job, context)
    return folder / "attempts.parquet"


def _score(model: str, table: AttemptTable, path: Path, verifier: Verifier) -> ModelScore:
    correct_QA = table.correct[0]
    answers = _answers(path, table, verifier)
    return ModelScore(
        model=model,
        avg_at_k=statistics.avg_at_k(correct_QA),
        pass_at_k=statistics.pass_at_k(correct_QA, correct_QA.shape[1]),
        maj_at_k=statistics.maj_at_k(answers, correct_QA),
        truncated_share=float(table.truncated.mean()),
        unparseable_share=float(np.mean(table.verdicts == Verdict.UNPARSEABLE.value)),
        timeout_share=float(np.mean(table.verdicts == Verdict.TIMEOUT.value)),
        mean_response_tokens=float(table.response_tokens.mean()),
    )


def _answers(path: Path, table: AttemptTable, verifier: Verifier) -> list[list[str | None]]:
    """[Q][A] what each attempt answered, in the forms the verifier reads."""
    forms = [form for form in ANSWER_FORMS if form in verifier.reads]
    rows = parquet.read_table(path, columns=["problem_id", "attempt", "response"]).to_pylist()
    found = {
        (row["problem_id"], row["attempt"]): extract_first(row["response"], forms) for row in rows
    }
    attempts_each = table.response_tokens.shape[2]
    return [[found[name, a] for a in range(attempts_each)] for name in table.problem_ids]


def _differences(
    models: Sequence[str], tables: Sequence[AttemptTable]
) -> tuple[PairedComparison, ...]:
    pairs = list(combinations(range(len(models)), 2))
    found = [
        statistics.paired_difference(tables[one].correct, tables[other].correct)
        for one, other in pairs
    ]
    corrected = statistics.holm([difference.p_value for difference in found])
    return tuple(
        PairedComparison(models[one], models[other], difference, p_value)
        for (one, other), difference, p_value in zip(pairs, found, corrected, strict=True)
    )
