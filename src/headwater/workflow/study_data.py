"""The problems a study is about: read, or stood in for while planning, and decontaminated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headwater.config.recipe import Recipe
from headwater.errors import SourceUnavailable
from headwater.tasks.benchmarks import BENCHMARKS
from headwater.tasks.contamination import ContaminationReport, remove_contaminated
from headwater.tasks.problems import LabelledProblems, is_generated, load_problems
from headwater.tasks.stand_ins import evaluation_size, stand_ins
from headwater.verify.verifiers import reads_rows
from headwater.workflow.recorded_data import ReadSource, file_bytes

#: An evaluation set that is a pool of the training source.
POOL = "pool:"


@dataclass(frozen=True)
class StudyData:
    """Training problems, worked ones from elsewhere, and evaluation sets that are no pool.

    unread: sources that could not be reached, whose problems are stand-ins. sources: everything
    that was read, before decontamination.
    """

    train: LabelledProblems
    worked: LabelledProblems | None
    evals: Mapping[str, LabelledProblems]
    contamination: ContaminationReport
    unread: tuple[str, ...] = ()
    sources: tuple[ReadSource, ...] = ()


def read_data(recipe: Recipe, *, planning: bool = False) -> StudyData:
    """Everything `recipe.task` names, without the training problems that are in an evaluation set.

    planning: a hub source that cannot be reached is stood in for by as many problems as the
    recipe asks for; those are not decontaminated. Raises InputError for any other source that
    cannot be read, and SourceUnavailable unless planning.
    """
    task, sizes = recipe.task, recipe.pools
    unread: list[str] = []
    sources: list[ReadSource] = []
    whole_rows = reads_rows(task.verifier)

    def read(
        key: str, source: str, columns: Mapping[str, str] | None, count: int
    ) -> LabelledProblems:
        mapping = None if is_generated(source) else columns
        size = file_bytes(source)
        try:
            data = load_problems(source, mapping, keep_rows=whole_rows)
        except SourceUnavailable:
            if not planning:
                raise
            unread.append(source)
            return stand_ins(source, count)
        sources.append(ReadSource(f"task.{key}", source, data, mapping or {}, whole_rows, size))
        return data

    evals = {
        name: read(f"eval.{name}", source, task.columns, _planned_size(source, recipe))
        for name, source in task.eval.items()
        if not source.startswith(POOL)
    }
    held_out = {name: data for name, data in evals.items() if task.eval[name] not in unread}
    elsewhere = task.worked is not None
    asked = sizes.labels + sizes.prompts + sizes.validation + (0 if elsewhere else sizes.worked)
    train, found = remove_contaminated(read("train", task.train, task.columns, asked), held_out)
    worked = None
    if task.worked is not None:
        worked, found_too = remove_contaminated(
            read("worked", task.worked, None, sizes.worked), held_out
        )
        found = found.with_other(found_too)
    return StudyData(train, worked, evals, found, tuple(dict.fromkeys(unread)), tuple(sources))


def _planned_size(source: str, recipe: Recipe) -> int:
    on_the_hub = source.startswith("hf:") or source in BENCHMARKS
    return evaluation_size(source, recipe.evaluation.problems) if on_the_hub else 0


def unread_warnings(data: StudyData) -> tuple[str, ...]:
    """What a plan with stand-ins leaves open."""
    if not data.unread:
        return ()
    return (
        f"not read, for want of the hub: {', '.join(data.unread)}; as many stand-in problems as "
        "the recipe asks for were planned with. Not done: decontamination against them, the check "
        "that prompt and verifier agree, and whether there are that many problems. Finished "
        "stages are not recognised. `headwater run` needs the data",
    )
