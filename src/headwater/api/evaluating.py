"""The verbs that measure: evaluate, verify, contamination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.api.records import VerifiedCases
from headwater.api.study import load
from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.comparison.compare import OnBatch
    from headwater.comparison.record import Comparison
    from headwater.comparison.settings import EvaluationSettings
    from headwater.tasks.contamination_check import ContaminationCheck


def evaluate(
    models: Sequence[str],
    settings: EvaluationSettings,
    out: str | Path | None = None,
    *,
    on_batch: OnBatch | None = None,
) -> Comparison:
    """avg@k, pass@k and maj@k of models on sets of problems, and the difference of every two.

    models: folders, or sources such as hf:ID. out: where every attempt is kept, by default
    runs/eval/MODEL-SET-HASH; the same call continues or reads back what is there. on_batch: told
    after each batch. Raises InputError before anything is sampled, Interrupted after Ctrl-C.
    """
    from headwater.comparison.compare import compare_models

    return compare_models(models, settings, None if out is None else Path(out), on_batch=on_batch)


def evaluation_settings(**values: Any) -> EvaluationSettings:
    """Settings of `evaluate` from plain values. Raises InputError listing what is wrong."""
    from pydantic import ValidationError

    from headwater.comparison.settings import EvaluationSettings

    try:
        return EvaluationSettings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_setting_problem(one) for one in error.errors())) from None


def _setting_problem(problem: Mapping[str, Any]) -> str:
    """A line; what a validator of ours says stands for itself."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return str(message)
    return f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {message}"


def verify(
    cases: str | Path | Sequence[tuple[str, str]],
    verifier: str = "math",
    *,
    wrap_bare: bool = False,
    workers: int = 1,
    timeout_seconds: float = 5.0,
    explain: bool = False,
) -> VerifiedCases:
    """Grade (prediction, gold) pairs, or a JSON Lines file of {prediction, gold[, id, expected]}.

    wrap_bare: put predictions without any box into one. explain: say step by step what was read
    and compared. Raises InputError with file and line.
    """
    from headwater.verify.cases import run_cases

    rows = run_cases(
        Path(cases) if isinstance(cases, str | Path) else cases,
        verifier,
        wrap_bare=wrap_bare,
        workers=workers,
        timeout_seconds=timeout_seconds,
        explain=explain,
    )
    return VerifiedCases(tuple(rows))


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """`NAME=SOURCE` or `SOURCE` as name -> source. Raises InputError for a name given twice."""
    from headwater.tasks.named_sources import named_sources as read

    return read(given)


def contamination(
    train: str,
    evals: Mapping[str, str] | None = None,
    *,
    ngram_words: int = 8,
    near_share: float = 0.5,
) -> ContaminationCheck:
    """Name every training problem that is in an evaluation set: exactly, normalised, or nearly.

    train: a source of problems, or a recipe (file or shipped name), which brings its evaluation
    sets along; evals: name -> source. Raises InputError for sources that cannot be read.
    """
    from headwater.recipes import is_recipe
    from headwater.tasks.contamination_check import check_contamination

    columns: Mapping[str, str] | None = None
    if is_recipe(train):
        task = load(train).task
        pools = [name for name, source in task.eval.items() if source.startswith("pool:")]
        own = {name: source for name, source in task.eval.items() if name not in pools}
        train, evals, columns = task.train, dict(evals or own), task.columns
    return check_contamination(
        train, evals or {}, columns=columns, ngram_words=ngram_words, near_share=near_share
    )
