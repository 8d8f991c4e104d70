"""The same problems answered by the arms a study is about, one attempt each, drawn by lot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.report.results import Results
from headwater.report.samples import ReadRollout, read_rollouts
from headwater.report.study_tables import students_of
from headwater.seeding import derive_key
from headwater.types import Verdict

PROBLEMS = 3
ARMS_AT_MOST = 8


@dataclass(frozen=True, slots=True)
class Answered:
    """One problem, and (arm's title, its attempt) of each arm."""

    problem_id: str
    prompt: str
    attempts: tuple[tuple[str, ReadRollout], ...]


def side_by_side(
    results: Results, run_dir: Path, arms: Sequence[str], problems: int = PROBLEMS
) -> tuple[Answered, ...]:
    """`problems` evaluation problems, one attempt an arm; those on which arms differ come first.

    Problem and attempt are drawn by lot from their names, with the first seed's models, so nobody
    chose them and the same run always shows the same. () where fewer than two arms left attempts.
    """
    if not results.rows:
        return ()
    rows = students_of(results)
    eval_set = results.eval_sets()[0]
    drawn: dict[str, Mapping[str, ReadRollout]] = {}
    titles: dict[str, str] = {}
    for arm in arms[:ARMS_AT_MOST]:
        row = rows.get((arm, eval_set))
        attempts = read_rollouts(run_dir, row.evaluations[0]) if row and row.evaluations else []
        if row and attempts:
            drawn[arm], titles[arm] = _one_each(attempts), row.title
    if len(drawn) < 2:
        return ()
    shared = set.intersection(*(set(found) for found in drawn.values()))
    lots = sorted(shared, key=lambda problem: derive_key("side by side", problem))
    ordered = sorted(
        lots, key=lambda problem: not _differ([one[problem] for one in drawn.values()])
    )
    return tuple(
        Answered(
            problem_id=problem,
            prompt=next(iter(drawn.values()))[problem].prompt,
            attempts=tuple((titles[arm], found[problem]) for arm, found in drawn.items()),
        )
        for problem in ordered[:problems]
    )


def _one_each(attempts: Sequence[ReadRollout]) -> dict[str, ReadRollout]:
    """For each problem the attempt that the lot falls on; the same number for every arm."""
    found: dict[str, ReadRollout] = {}
    lot: dict[str, tuple[int, int]] = {}
    for one in attempts:
        key = derive_key("attempt", one.problem_id, one.sample), one.sample
        if one.problem_id not in lot or key < lot[one.problem_id]:
            lot[one.problem_id], found[one.problem_id] = key, one
    return found


def _differ(attempts: Sequence[ReadRollout]) -> bool:
    right = {one.verdict == Verdict.CORRECT.value for one in attempts}
    return len(right) == 2
