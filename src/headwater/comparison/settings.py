"""What every model is asked, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from headwater.config.base import Settings
from headwater.config.compute import Compute
from headwater.config.evaluation import EvaluationSampling
from headwater.errors import InputError
from headwater.tasks.named_sources import NAME, named_sources
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.verify.verifiers import check_answers, reads_rows


def _sources(value: Any) -> Any:
    """Problem sets by name, from one source, several, or a mapping."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        return value
    try:
        return named_sources(map(str, value))
    except InputError as error:
        raise ValueError(str(error)) from None


class EvaluationSettings(Settings):
    """What every model is asked, and how.

    problems: sources by name; also one source or a list of `SOURCE` and `NAME=SOURCE`, which are
    named after their file or dataset. limit: only the first so many problems of each set. rows:
    responses that are decoded at once, by default 64 on a CPU and 512 on a GPU.
    """

    problems: Annotated[dict[str, str], BeforeValidator(_sources), Field(min_length=1)]
    attempts: PositiveInt = 16
    verifier: str = "math"
    prompt: str = "boxed"
    limit: PositiveInt | None = None
    sampling: EvaluationSampling = EvaluationSampling()
    seed: int = 0
    compute: Compute = Field(default_factory=Compute)
    rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _attempts_differ(self) -> Self:
        wrong = self.sampling.problem_with(self.attempts)
        if wrong is not None:
            raise ValueError(wrong)
        return self

    @model_validator(mode="after")
    def _names_are_folders(self) -> Self:
        for name, source in self.problems.items():
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a set: expected letters, digits and - _ . +; write "
                    f"NAME={source}"
                )
        return self


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """The problems that are asked of a source, which has `available` of them."""

    source: str
    data: LabelledProblems
    available: int


def read_sets(settings: EvaluationSettings) -> dict[str, ProblemSet]:
    """The problems of every set, cut to `limit`. Raises InputError as `load_problems` does."""
    return {name: _first(source, settings) for name, source in settings.problems.items()}


def _first(source: str, settings: EvaluationSettings) -> ProblemSet:
    limit = settings.limit
    data = load_problems(source, keep_rows=reads_rows(settings.verifier))
    check_answers(settings.verifier, source, data.labels)
    if limit is None or limit >= len(data):
        return ProblemSet(source, data, len(data))
    first = {problem.id for problem in data.problems[:limit]}
    return ProblemSet(source, data.only(lambda problem: problem.id in first), len(data))
