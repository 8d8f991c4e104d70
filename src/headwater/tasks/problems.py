"""Problems with their labels: what every source of problems is turned into."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from headwater.errors import InputError, SourceUnavailable
from headwater.tasks.benchmarks import BENCHMARKS, Benchmark
from headwater.tasks.rows import Row, read_rows, source_name
from headwater.tasks.shapes import recognise
from headwater.types import Label, Problem


@dataclass(frozen=True)
class LabelledProblems:
    """Problems and, apart from them, their labels in the same order; ids are unique.

    A set that is never graded has no labels at all. Labels do not show in the repr: they belong
    in the label vault.
    """

    problems: tuple[Problem, ...]
    labels: tuple[Label, ...] = field(repr=False)

    @classmethod
    def of(cls, problems: Iterable[Problem], labels: Iterable[Label]) -> LabelledProblems:
        """Bundle problems with labels of the same ids in the same order (or none).

        Raises InputError for ids that differ or repeat.
        """
        problems, labels = tuple(problems), tuple(labels)
        named = all(p.id == x.problem_id for p, x in zip(problems, labels, strict=False))
        if labels and not (named and len(labels) == len(problems)):
            raise InputError(
                f"{len(problems)} problems and {len(labels)} labels do not name the same ids in "
                "the same order; give each problem its own label"
            )
        if len({problem.id for problem in problems}) < len(problems):
            counts = Counter(problem.id for problem in problems)
            repeated = next(id_ for id_, count in counts.items() if count > 1)
            raise InputError(f"problem id {repeated!r} occurs twice; ids must be unique")
        return cls(problems, labels)

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over every field of problems and labels, in hexadecimal."""
        return _hash(self.problems, self.labels)

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


def load_problems(
    source: str, columns: Mapping[str, str] | None = None, *, keep_rows: bool = False
) -> LabelledProblems:
    """Read and check all problems of `source`.

    source: a path ending in .jsonl, .jsonl.gz, .json or .parquet; `hf:ID[:CONFIG][:SPLIT]`
    (a hub dataset, the train split unless named); the name of a benchmark, such as gsm8k
    (`headwater.tasks.benchmarks`); `task:NAME?option=value&...` (an embedded task) or
    `reasoning_gym:NAME?option=value&...` (a task of that library). columns: our field name ->
    theirs (a dot reaches into records), for sources of none of the shapes known by their column
    names (`headwater.tasks.shapes`); a benchmark has its own. keep_rows: labels carry their whole
    rows, for a reward function; rows then need no answer.

    Raises InputError naming the row, its value, what was expected and the cure: unreadable or
    unknown sources, missing columns, empty prompts or answers, one id twice (but exact copies
    in DAPO-Math-17k, which is published with many of each row, count once), no rows.
    """
    if is_generated(source):
        return _generated(source, columns, keep_rows)
    if source in BENCHMARKS:
        return _load_benchmark(BENCHMARKS[source], keep_rows)
    return problems_of_rows(read_rows(source), source, columns, keep_rows=keep_rows)


def problems_of_rows(
    rows: Iterable[Row],
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    keep_rows: bool = False,
) -> LabelledProblems:
    """Read and check rows that are there already; `source` names them.

    columns, keep_rows and errors: as of `load_problems`.
    """
    name = source_name(source)
    shape = None
    place: dict[str, int] = {}  # of each problem, by id
    problems: list[Problem] = []
    labels: list[Label] = []
    numbers: list[int] = []  # of each problem's row
    for index, row in enumerate(rows):
        if shape is None:
            shape = recognise(row, columns or {}, keep_rows=keep_rows)
        problem, label = shape.read(row, name, index)
        first = place.setdefault(problem.id, len(problems))
        if first == len(problems):
            problems.append(problem)
            labels.append(label)
            numbers.append(row.number)
        elif not (shape.repeats and (problems[first], labels[first]) == (problem, label)):
            raise InputError(
                f"{row.where}: id {problem.id!r} was already given by {row.place}{numbers[first]}; "
                "give every problem its own id"
            )
    if not problems:
        raise InputError(f"{source} has no rows; give a source with at least one problem")
    return LabelledProblems.of(problems, labels)


def is_generated(source: str) -> bool:
    """Whether a source makes its problems itself, and so has no columns to map."""
    return source.startswith(("task:", "reasoning_gym:"))


def _load_benchmark(benchmark: Benchmark, keep_rows: bool) -> LabelledProblems:
    try:
        return load_problems(benchmark.source, benchmark.columns, keep_rows=keep_rows)
    except SourceUnavailable as error:
        name = benchmark.name
        raise SourceUnavailable(
            f"{name} is a dataset of the hub: {error}, as in --problems {name}=PATH or "
            f"task.eval: {{{name}: PATH}}"
        ) from error


def _generated(source: str, columns: Mapping[str, str] | None, keep_rows: bool) -> LabelledProblems:
    if columns:
        raise InputError(f"columns are given, but {source} has none; remove task.columns")
    # These build on this module.
    from headwater.tasks import arithmetic, procedural

    if source.startswith("reasoning_gym:"):
        return procedural.load(source)
    data = arithmetic.load(task_options(source))
    if not keep_rows:
        return data
    rows = (
        {"prompt": problem.prompt, "answer": label.answer, "solution": label.solution}
        for problem, label in zip(data.problems, data.labels, strict=True)
    )
    labels = (replace(label, row=row) for label, row in zip(data.labels, rows, strict=True))
    return LabelledProblems.of(data.problems, labels)


def task_options(source: str) -> dict[str, str]:
    """The options of an embedded task's source, `task:arithmetic?option=value&...`.

    Raises InputError for an unknown task and for options that repeat or have no value.
    """
    if source.partition("?")[0] != "task:arithmetic":
        raise InputError(f"{source} names no embedded task; use task:arithmetic")
    return source_options(source)


def source_options(source: str) -> dict[str, str]:
    """The options behind the question mark of `KIND:NAME?option=value&option=value`.

    Raises InputError for options that repeat or have no value.
    """
    name, _, query = source.partition("?")
    options: dict[str, str] = {}
    for item in query.split("&") if query else []:
        option, equals, value = item.partition("=")
        if not (option and equals) or option in options:
            raise InputError(
                f"{source}: {item!r} repeats an option or is not option=value; write "
                f"{name}?option=value&option=value"
            )
        options[option] = value
    return options


def _hash(problems: Iterable[Problem], labels: Iterable[Label]) -> str:
    digest = hashlib.sha256()
    asked = ((p.id, p.prompt, p.source, p.level, p.subject, *p.before) for p in problems)
    answers = ((x.problem_id, x.answer, x.solution, *([x.row] if x.row else [])) for x in labels)
    encode = json.JSONEncoder().encode
    for record in chain[tuple[object, ...]](asked, answers):
        digest.update(f"{encode(record)}\n".encode())
    return digest.hexdigest()
