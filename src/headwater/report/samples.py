"""Reading the answers a run left, from training and from evaluation: for terminal and page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from headwater.errors import InputError
from headwater.near_names import choose
from headwater.report.results import RESULTS_FILE, Results, Row, read_results
from headwater.seeding import derive_key
from headwater.terminal import BAD, CAUTION, GOOD, HEADING, QUIET, STUDENT
from headwater.types import FinishReason, Verdict
from headwater.visible import excerpt, visible
from headwater.workflow.confinement import require_own_files

ROLLOUTS_FILE = "rollouts.parquet"  # of a stage that sampled
ATTEMPTS_FILE = "attempts.parquet"  # of an evaluation
_ROWS_AT_ONCE = 4096
_ROLLOUT_COLUMNS = (
    "stage",
    "step",
    "problem_id",
    "sample",
    "prompt",
    "response",
    "verdict",
    "reward",
    "response_tokens",
    "finish_reason",
)
_ATTEMPT_COLUMNS = (
    "problem_id",
    "attempt",
    "prompt",
    "response",
    "verdict",
    "response_tokens",
    "truncated",
)
_MARKS = {
    Verdict.CORRECT.value: ("✓ correct", f"bold {GOOD}"),
    Verdict.INCORRECT.value: ("✗ incorrect", BAD),
    Verdict.UNPARSEABLE.value: ("? no answer found", CAUTION),
    Verdict.TIMEOUT.value: ("… verifier ran out of time", CAUTION),
}


@dataclass(frozen=True, slots=True)
class ReadRollout:
    """One answer of a model, from training or from an evaluation.

    stage: fingerprint. verdict is None where nothing was graded; step and reward are None in
    evaluations, which train nothing. sample counts the answers to one problem.
    """

    stage: str
    step: int | None
    problem_id: str
    sample: int
    prompt: str
    response: str
    verdict: str | None
    reward: float | None
    response_tokens: int
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """Whether the response ran into the length limit."""
        return self.finish_reason == FinishReason.LENGTH.value


def read_rollouts(run_dir: Path, fingerprint: str) -> list[ReadRollout]:
    """Answers of one artifact: an evaluation's attempts, or the rollouts of its last step.

    Empty when it left neither. Raises InputError when the file is not such a table.
    """
    folder = run_dir / "artifacts" / fingerprint
    attempts, rollouts = folder / ATTEMPTS_FILE, folder / ROLLOUTS_FILE
    if attempts.is_file():
        rows = _read_rows(attempts, _ATTEMPT_COLUMNS)
        return [_from_attempt(fingerprint, row) for row in rows]
    if not rollouts.is_file():
        return []
    last = max((row["step"] for row in _read_rows(rollouts, ("step",))), default=None)
    if last is None:
        return []
    rows = _read_rows(rollouts, _ROLLOUT_COLUMNS, ds.field("step") == last)
    return [ReadRollout(**row) for row in rows]


def _read_rows(
    path: Path, columns: Sequence[str], wanted: ds.Expression | None = None
) -> Iterator[dict[str, Any]]:
    """Rows in the file's order, as dicts of these columns; some thousands of them at a time."""
    try:
        found = ds.dataset(path, format="parquet")
        batches = found.to_batches(
            columns=list(columns),
            filter=wanted,
            batch_size=_ROWS_AT_ONCE,
            batch_readahead=1,
            fragment_readahead=1,
        )
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); expected Parquet with the "
            f"columns {', '.join(columns)}: run the stage again"
        ) from error


def _from_attempt(fingerprint: str, row: Mapping[str, Any]) -> ReadRollout:
    return ReadRollout(
        stage=fingerprint,
        step=None,
        problem_id=row["problem_id"],
        sample=row["attempt"],
        prompt=row["prompt"],
        response=row["response"],
        verdict=row["verdict"],
        reward=None,
        response_tokens=row["response_tokens"],
        finish_reason=(FinishReason.LENGTH if row["truncated"] else FinishReason.STOP).value,
    )


def rollouts_of_arm(run_dir: Path, results: Results, row: Row) -> list[ReadRollout]:
    """What the row's model answered last: in its evaluation, else in its latest own stage.

    With several seeds, that of the first. Graded rollouts are preferred; a stage of the arm's
    other model is never taken.
    """
    model_of = {stage.fingerprint: stage.model for stage in results.stages}
    own = model_of.get(row.stages[-1]) if row.stages else None  # parents first: an endpoint
    own_stages = [one for one in reversed(row.stages) if own and model_of.get(one) == own]
    ungraded: list[ReadRollout] = []
    for fingerprint in (*row.evaluations, *own_stages):
        rollouts = read_rollouts(run_dir, fingerprint)
        if any(rollout.verdict is not None for rollout in rollouts):
            return rollouts
        ungraded = ungraded or rollouts
    return ungraded


def draw_lots(
    rollouts: Iterable[ReadRollout], verdicts: Sequence[str | None], number: int
) -> list[ReadRollout]:
    """`number` rollouts with one of these verdicts, of different problems where possible.

    Drawn by lot from the names of problem and sample, so nobody has chosen them and the same
    run always shows the same ones.
    """
    drawn = sorted(
        (rollout for rollout in rollouts if rollout.verdict in verdicts),
        key=lambda one: derive_key("samples", one.stage, one.problem_id, one.sample),
    )
    first_of_problem: dict[str, ReadRollout] = {}
    for rollout in drawn:
        first_of_problem.setdefault(rollout.problem_id, rollout)
    firsts = list(first_of_problem.values())
    if len(firsts) >= number:
        return firsts[:number]
    return (firsts + [rollout for rollout in drawn if rollout not in firsts])[:number]


def collect_samples(
    run_dir: Path, *, arm: str | None = None, stage: str | None = None, number: int = 4
) -> list[tuple[str, list[ReadRollout]]]:
    """(heading, rollouts) pairs: half correct and half not, where verdicts are known.

    arm: only this arm's; stage: only stages of this kind or with this fingerprint (or its
    beginning). Without `stage` the rollouts are the newest of each arm. A run that has no
    results yet is read by its artifacts. Raises InputError when nothing matches.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder; give the folder of a run")
    require_own_files(run_dir)
    if not (run_dir / RESULTS_FILE).is_file():
        if arm is not None:
            raise InputError(
                f"arm {arm!r} is not known yet: {run_dir} has no {RESULTS_FILE}; leave out the "
                "arm to read what its stages have left so far"
            )
        groups = _by_artifact(run_dir, stage, number)
    else:
        results = read_results(run_dir)
        rows = _rows_of(results, arm)
        groups = _by_row(run_dir, results, rows, number) if stage is None else []
        groups = groups or _by_stage(run_dir, results, arm, stage, number)
    found = [(heading, rollouts) for heading, rollouts in groups if rollouts]
    if not found:
        raise InputError(
            f"no rollouts in {run_dir} for arm={arm or 'any'}, stage={stage or 'any'}; run "
            "`headwater samples` without them to see what there is"
        )
    return found


def print_samples(
    run_dir: Path,
    console: Console,
    *,
    arm: str | None = None,
    stage: str | None = None,
    number: int = 4,
) -> None:
    """Print what `collect_samples` finds, control characters made visible."""
    for heading, rollouts in collect_samples(run_dir, arm=arm, stage=stage, number=number):
        console.print(Rule(Text(visible(heading), style=HEADING), align="left"))
        for rollout in rollouts:
            console.print(_as_text(rollout))


def verdict_mark(rollout: ReadRollout) -> tuple[str, str]:
    """(words, style) of a rollout's verdict; ungraded ones say so."""
    if rollout.verdict is None:
        return "not graded", STUDENT
    return _MARKS.get(rollout.verdict, (rollout.verdict, STUDENT))


def _as_text(rollout: ReadRollout) -> Text:
    words, style = verdict_mark(rollout)
    cut = ", cut at the length limit" if rollout.truncated else ""
    step = f", step {rollout.step}" if rollout.step is not None else ""
    text = Text()
    text.append(f"{words}", style=style)
    text.append(
        visible(
            f"  problem {rollout.problem_id}, sample {rollout.sample}{step}, "
            f"{rollout.response_tokens} tokens{cut}\n"
        ),
        style=QUIET,
    )
    text.append(visible(excerpt(rollout.prompt, 1_200)).rstrip() + "\n", style="italic")
    text.append(visible(excerpt(rollout.response, 4_000)).rstrip() + "\n")
    return text


def _mixture(rollouts: Sequence[ReadRollout], number: int) -> list[ReadRollout]:
    wrong = (Verdict.INCORRECT.value, Verdict.UNPARSEABLE.value, Verdict.TIMEOUT.value)
    right = draw_lots(rollouts, (Verdict.CORRECT.value,), (number + 1) // 2)
    missed = draw_lots(rollouts, wrong, number - len(right))
    return (right + missed) or draw_lots(rollouts, (None,), number)


def _rows_of(results: Results, arm: str | None) -> list[Row]:
    rows = [row for row in results.rows if arm in (None, row.arm)]
    if not rows:
        raise InputError(f"arm {arm!r} is not in this run; {choose(arm, results.titles())}")
    return rows


def _by_row(
    run_dir: Path, results: Results, rows: Iterable[Row], number: int
) -> list[tuple[str, list[ReadRollout]]]:
    groups: dict[str, list[ReadRollout]] = {}
    for row in rows:
        heading = f"{row.title} ({row.evaluates})"
        if not groups.get(heading):
            groups[heading] = _mixture(rollouts_of_arm(run_dir, results, row), number)
    return list(groups.items())


def _by_stage(
    run_dir: Path, results: Results, arm: str | None, stage: str | None, number: int
) -> list[tuple[str, list[ReadRollout]]]:
    titles = results.titles()
    groups = []
    for one in results.stages:
        if arm is not None and arm not in one.used_by:
            continue
        if stage is None or one.kind == stage or one.fingerprint.startswith(stage):
            users = ", ".join(titles.get(name, name) for name in one.used_by)
            heading = f"{one.model} {one.kind} on {one.pool}, seed {one.seed}: {users}"
            rollouts = read_rollouts(run_dir, one.fingerprint)
            groups.append((heading, _mixture(rollouts, number)))
    return groups


def _by_artifact(
    run_dir: Path, stage: str | None, number: int
) -> list[tuple[str, list[ReadRollout]]]:
    names = {
        path.parent.name
        for file in (ROLLOUTS_FILE, ATTEMPTS_FILE)
        for path in (run_dir / "artifacts").glob(f"*/{file}")
    }
    return [
        (name, _mixture(read_rollouts(run_dir, name), number))
        for name in sorted(names)
        if stage is None or name.startswith(stage)
    ]
