"""What every model is asked, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from headwater.config.base import Settings
from headwater.config.evaluation import EvaluationSampling
from headwater.config.recipe import Compute
from headwater.tasks.benchmarks import BENCHMARKS
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.tasks.rows import source_name

#: What may stand before the first `=` of NAME=VALUE: no path separators, no colons.
_NAME = re.compile(r"[A-Za-z0-9][\w .+-]*")


def _sources(value: Any) -> Any:
    """Problem sets by name, from one source, several, or a mapping."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        return value
    found: dict[str, str] = {}
    for item in value:
        name, source = split_name(str(item))
        name = name or default_name(source)
        if name in found:
            raise ValueError(f"{name} is given twice; name the sets apart: NAME={source}")
        found[name] = source
    return found


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
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a set: expected letters, digits and - _ . +; write "
                    f"NAME={source}"
                )
        return self


def split_name(text: str) -> tuple[str | None, str]:
    """(name, value) of `NAME=VALUE`; the name is None where there is none.

    >>> split_name("mine=a/b.jsonl"), split_name("task:arithmetic?count=5")
    (('mine', 'a/b.jsonl'), (None, 'task:arithmetic?count=5'))
    """
    name, equals, value = text.partition("=")
    return (name, value) if equals and value and _NAME.fullmatch(name) else (None, text)


def default_name(source: str) -> str:
    """How a set is called unless it is given a name.

    >>> default_name("gsm8k"), default_name("data/gsm8k_test.jsonl"), default_name("task:sums?a=1")
    ('gsm8k', 'gsm8k_test', 'sums')
    """
    if source in BENCHMARKS:
        return source
    if source.startswith("task:"):
        return source.removeprefix("task:").partition("?")[0]
    return source_name(source)


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """The problems that are asked of a source, which has `available` of them."""

    source: str
    data: LabelledProblems
    available: int


def read_sets(settings: EvaluationSettings) -> dict[str, ProblemSet]:
    """The problems of every set, cut to `limit`. Raises InputError as `load_problems` does."""
    return {name: _first(source, settings.limit) for name, source in settings.problems.items()}


def _first(source: str, limit: int | None) -> ProblemSet:
    data = load_problems(source)
    if limit is None or limit >= len(data):
        return ProblemSet(source, data, len(data))
    first = {problem.id for problem in data.problems[:limit]}
    return ProblemSet(source, data.only(lambda problem: problem.id in first), len(data))
