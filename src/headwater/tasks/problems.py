"""Problems with their labels: what every source of problems is turned into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field

from headwater.errors import InputError, SourceUnavailable
from headwater.tasks.benchmarks import BENCHMARKS, Benchmark
from headwater.tasks.rows import read_rows, source_name
from headwater.tasks.shapes import recognise
from headwater.types import Label, Problem


@dataclass(frozen=True, slots=True)
class LabelledProblems:
    """Problems and, apart from them, their labels in the same order; ids are unique.

    A set that is never graded has no labels at all. data_hash covers every field of both. Labels
    do not show in the repr: they belong in the label vault.
    """

    problems: tuple[Problem, ...]
    labels: tuple[Label, ...] = field(repr=False)
    data_hash: str

    @classmethod
    def of(cls, problems: Iterable[Problem], labels: Iterable[Label]) -> LabelledProblems:
        """Bundle problems with labels of the same ids in the same order (or none), and hash them.

        Raises InputError for ids that differ or repeat.
        """
        problems, labels = tuple(problems), tuple(labels)
        ids = [problem.id for problem in problems]
        if labels and ids != [label.problem_id for label in labels]:
            raise InputError(
                f"{len(problems)} problems and {len(labels)} labels do not name the same ids in "
                "the same order; give each problem its own label"
            )
        if len(set(ids)) < len(ids):
            repeated = next(id_ for index, id_ in enumerate(ids) if id_ in ids[:index])
            raise InputError(f"problem id {repeated!r} occurs twice; ids must be unique")
        return cls(problems, labels, _hash(problems, labels))

    def __len__(self) -> int:
        return len(self.problems)

    def only(self, keep: Callable[[Problem], bool]) -> LabelledProblems:
        """The problems for which `keep` is true, in order, with their labels."""
        kept = [problem for problem in self.problems if keep(problem)]
        ids = {problem.id for problem in kept}
        return LabelledProblems.of(kept, (x for x in self.labels if x.problem_id in ids))

    def without_labels(self) -> LabelledProblems:
        """The same problems as a set that is never graded."""
        return LabelledProblems.of(self.problems, ())


def load_problems(source: str, columns: Mapping[str, str] | None = None) -> LabelledProblems:
    """Read and check all problems of `source`.

    source: a path ending in .jsonl, .jsonl.gz, .json or .parquet; `hf:ID[:CONFIG][:SPLIT]`
    (a hub dataset, the train split unless named); the name of a benchmark, such as gsm8k
    (`headwater.tasks.benchmarks`); or `task:NAME?option=value&...` (an embedded task).
    columns: our field name -> theirs (a dot reaches into records), for sources of none of the
    shapes known by their column names (`headwater.tasks.shapes`); a benchmark has its own.

    Raises InputError naming the row, its value, what was expected and the cure: unreadable or
    unknown sources, missing columns, empty prompts or answers, one id twice (but exact copies
    in DAPO-Math-17k, which is published with many of each row, count once), no rows.
    """
    if source.startswith("task:"):
        return _load_task(source, columns)
    if source in BENCHMARKS:
        return _load_benchmark(BENCHMARKS[source])
    name = source_name(source)
    shape = None
    seen: dict[str, tuple[str, Problem, Label]] = {}
    for index, row in enumerate(read_rows(source)):
        if shape is None:
            shape = recognise(row, columns or {})
        problem, label = shape.read(row, name, index)
        first = seen.setdefault(problem.id, (row.where, problem, label))
        if first[0] != row.where and not (shape.repeats and first[1:] == (problem, label)):
            raise InputError(
                f"{row.where}: id {problem.id!r} was already given by {first[0]}; "
                "give every problem its own id"
            )
    if not seen:
        raise InputError(f"{source} has no rows; give a source with at least one problem")
    return LabelledProblems.of(
        (problem for _, problem, _ in seen.values()), (label for _, _, label in seen.values())
    )


def _load_benchmark(benchmark: Benchmark) -> LabelledProblems:
    try:
        return load_problems(benchmark.source, benchmark.columns)
    except SourceUnavailable as error:
        name = benchmark.name
        raise SourceUnavailable(
            f"{name} is a dataset of the hub: {error}, as in --problems {name}=PATH or "
            f"task.eval: {{{name}: PATH}}"
        ) from error


def _load_task(source: str, columns: Mapping[str, str] | None) -> LabelledProblems:
    if columns:
        raise InputError(f"columns are given, but {source} has none; remove task.columns")
    options = task_options(source)
    # The task builds on this module.
    from headwater.tasks import arithmetic

    return arithmetic.load(options)


def task_options(source: str) -> dict[str, str]:
    """The options of an embedded task's source, `task:arithmetic?option=value&...`.

    Raises InputError for an unknown task and for options that repeat or have no value.
    """
    name, _, query = source.removeprefix("task:").partition("?")
    if name != "arithmetic" or not source.startswith("task:"):
        raise InputError(f"{source} names no embedded task; use task:arithmetic")
    options: dict[str, str] = {}
    for item in query.split("&") if query else []:
        option, equals, value = item.partition("=")
        if not (option and equals) or option in options:
            raise InputError(
                f"{source}: {item!r} repeats an option or is not option=value; write "
                f"task:{name}?option=value&option=value"
            )
        options[option] = value
    return options


def _hash(problems: Iterable[Problem], labels: Iterable[Label]) -> str:
    digest = hashlib.sha256()
    fields = [*map(astuple, problems), *map(astuple, labels)]
    for record in fields:
        digest.update(json.dumps(record).encode())
        digest.update(b"\n")
    return digest.hexdigest()
