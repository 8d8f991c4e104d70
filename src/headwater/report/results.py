"""results.json: what a run found, what it spent and where each number comes from.

`build_results` is pure: it takes the evaluations' verdict tables and what the workflow knows
of arms and stages, and computes every estimate and difference. The models are strict and
versioned, so that a file of another version is refused and not half understood.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from headwater import __version__
from headwater.errors import InputError
from headwater.evals import statistics
from headwater.types import AttemptTable, Verdict
from headwater.workflow.record import ContrastRecord

RESULTS_FILE = "results.json"
SCHEMA = 1

Fingerprint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Spent = dict[str, int | float]  # the ledger's counters by name
Evaluated = Literal["teacher", "student"]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True
    )


class Machine(_Record):
    """Where the run took place and with which libraries."""

    cpu: str
    threads: int
    torch: str
    transformers: str


class Row(_Record):
    """One arm's model on one evaluation set.

    avg_at_k is averaged over `problems` problems, `attempts` attempts and the seeds;
    standard_error is over problems (None for a single problem); interval is the 95 % interval
    over problems and, with several seeds, seeds. `spent` is what the arm used for one seed
    (the mean over seeds), shared stages included. `stages` and `evaluations` are artifact
    fingerprints.
    """

    arm: str
    title: str
    evaluates: Evaluated
    eval_set: str
    attempts: int
    problems: int
    avg_at_k: Share
    standard_error: float | None
    interval: tuple[float, float]
    per_seed: tuple[float, ...]
    pass_at_k: Share
    truncated_share: Share
    unparseable_share: Share
    timeout_share: Share
    mean_response_tokens: float
    chain: tuple[str, ...]
    spent: Spent
    stages: tuple[Fingerprint, ...]
    evaluations: tuple[Fingerprint, ...] = ()


class DifferenceRow(_Record):
    """A declared contrast: avg@k of `better` minus that of `than` on the same problems.

    p_value_corrected is Holm's over all differences of the run. minimum_detectable is the
    true difference that four in five such comparisons would show.
    """

    better: str
    than: str
    eval_set: str
    difference: float
    interval: tuple[float, float]
    standard_error: float
    p_value: float
    p_value_corrected: float
    minimum_detectable: float
    differs_in: tuple[str, ...] | None = None

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out zero and the corrected p-value is at most 0.05."""
        return not self.interval[0] <= 0.0 <= self.interval[1] and self.p_value_corrected <= 0.05


class StageRow(_Record):
    """One stage that was run once, whoever uses it."""

    fingerprint: Fingerprint
    kind: str
    model: str
    pool: str | None
    seed: int
    used_by: tuple[str, ...]
    seconds: float
    spent: Spent


class LedgerTotals(_Record):
    """Training as counted once, everything physically done (replays included), evaluation."""

    physical: Spent
    training: Spent
    evaluation: Spent


class Results(_Record):
    """The whole of results.json."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str
    headwater: str
    seeds: tuple[int, ...]
    machine: Machine
    question: str | None = None
    rows: tuple[Row, ...]
    differences: tuple[DifferenceRow, ...]
    stages: tuple[StageRow, ...]
    ledger: LedgerTotals
    pools: dict[str, int]
    contamination: tuple[dict[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def eval_sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets, in the order of their first row."""
        return tuple(dict.fromkeys(row.eval_set for row in self.rows))

    def titles(self) -> dict[str, str]:
        """Arm name -> title; an arm whose teacher is evaluated too goes by its student's."""
        students_last = sorted(self.rows, key=lambda row: row.evaluates == "student")
        return {row.arm: row.title for row in students_last}


@dataclass(frozen=True, slots=True)
class ArmEvaluation:
    """What the workflow knows of one arm's model on one evaluation set.

    chain: what was trained how, such as "teacher: grpo(labels)". spent: the arm's logical
    spending for one seed. stages: fingerprints of its stages; evaluations: those of the evaluation
    artifacts whose rollouts can be read.
    """

    arm: str
    title: str
    evaluates: Evaluated
    eval_set: str
    table: AttemptTable
    chain: tuple[str, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything `build_results` needs."""

    name: str
    seeds: tuple[int, ...]
    machine: Machine
    evaluations: tuple[ArmEvaluation, ...]
    contrasts: tuple[ContrastRecord, ...]
    stages: tuple[StageRow, ...]
    ledger: LedgerTotals
    pools: Mapping[str, int]
    contamination: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    question: str | None = None


def build_results(run: RunRecord) -> Results:
    """Estimates, differences and accounts of a run; pure and seeded.

    Raises InputError when a contrast names an arm that was not evaluated or two arms were
    evaluated on different problems.
    """
    return Results(
        name=run.name,
        headwater=__version__,
        seeds=run.seeds,
        machine=run.machine,
        question=run.question,
        rows=tuple(_row(evaluation) for evaluation in run.evaluations),
        differences=_differences(run.contrasts, run.evaluations),
        stages=run.stages,
        ledger=run.ledger,
        pools=dict(run.pools),
        contamination=tuple(dict(entry) for entry in run.contamination),
        warnings=run.warnings,
    )


def write_results(results: Results, run_dir: Path) -> Path:
    """Write RUN/results.json, whole or not at all, and return its path."""
    path = run_dir / RESULTS_FILE
    beside = path.with_suffix(".json.part")
    content = json.dumps(results.model_dump(mode="json", by_alias=True), indent=1)
    beside.write_text(content + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def read_results(run_dir: Path) -> Results:
    """Read RUN/results.json. Raises InputError when missing, of another version or damaged."""
    path = run_dir / RESULTS_FILE
    if not path.is_file():
        raise InputError(
            f"{path} is missing; expected a run that has finished its evaluation: "
            "continue it with `headwater run`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); run `headwater run` again") from error
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise InputError(
            f"{path} has schema {version!r}; this headwater ({__version__}) reads {SCHEMA}: "
            "use the version that wrote it, or run `headwater run` again"
        )
    try:
        return Results.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where}: {first['msg']}; run `headwater run` again to rebuild it"
        ) from error


def _row(evaluation: ArmEvaluation) -> Row:
    table = evaluation.table
    found = statistics.avg_at_k(table.correct)
    _, problems, attempts = table.correct.shape
    return Row(
        arm=evaluation.arm,
        title=evaluation.title,
        evaluates=evaluation.evaluates,
        eval_set=evaluation.eval_set,
        attempts=attempts,
        problems=problems,
        avg_at_k=found.mean,
        standard_error=None if math.isnan(found.standard_error) else found.standard_error,
        interval=(found.low, found.high),
        per_seed=found.seed_means,
        pass_at_k=float(table.correct.any(axis=2).mean()),
        truncated_share=float(np.mean(table.truncated)),
        unparseable_share=_share_of(table, Verdict.UNPARSEABLE),
        timeout_share=_share_of(table, Verdict.TIMEOUT),
        mean_response_tokens=float(np.mean(table.response_tokens)),
        chain=evaluation.chain,
        spent=dict(evaluation.spent),
        stages=evaluation.stages,
        evaluations=evaluation.evaluations,
    )


def _share_of(table: AttemptTable, verdict: Verdict) -> float:
    return float(np.mean(table.verdicts == verdict.value))


def _differences(
    contrasts: Sequence[ContrastRecord], evaluations: Sequence[ArmEvaluation]
) -> tuple[DifferenceRow, ...]:
    found: list[tuple[ContrastRecord, str, statistics.Difference]] = []
    for contrast in contrasts:
        better = _by_eval_set(contrast.better, evaluations)
        than = _by_eval_set(contrast.than, evaluations)
        for eval_set in (name for name in better if name in than):
            found.append((contrast, eval_set, _difference(better[eval_set], than[eval_set])))
    corrected = statistics.holm([difference.p_value for _, _, difference in found])
    return tuple(
        DifferenceRow(
            better=contrast.better,
            than=contrast.than,
            eval_set=eval_set,
            difference=difference.mean,
            interval=(difference.low, difference.high),
            standard_error=difference.standard_error,
            p_value=difference.p_value,
            p_value_corrected=p_value,
            minimum_detectable=difference.minimum_detectable,
            differs_in=contrast.differs_in,
        )
        for (contrast, eval_set, difference), p_value in zip(found, corrected, strict=True)
    )


def _by_eval_set(arm: str, evaluations: Sequence[ArmEvaluation]) -> dict[str, ArmEvaluation]:
    """The arm's evaluation on each set: its student's where there is one, else its teacher's."""
    chosen: dict[str, ArmEvaluation] = {}
    for evaluation in evaluations:
        if evaluation.arm == arm and (
            evaluation.eval_set not in chosen or evaluation.evaluates == "student"
        ):
            chosen[evaluation.eval_set] = evaluation
    if not chosen:
        known = ", ".join(dict.fromkeys(evaluation.arm for evaluation in evaluations))
        raise InputError(
            f"contrast names arm {arm!r}, which was not evaluated; evaluated arms: {known}"
        )
    return chosen


def _difference(better: ArmEvaluation, than: ArmEvaluation) -> statistics.Difference:
    first, second = better.table, than.table
    if set(first.problem_ids) != set(second.problem_ids):
        raise InputError(
            f"{better.arm!r} and {than.arm!r} were evaluated on different problems of "
            f"{better.eval_set!r}; a paired difference needs the same: evaluate both again"
        )
    place = {problem_id: index for index, problem_id in enumerate(second.problem_ids)}
    order_Q = [place[problem_id] for problem_id in first.problem_ids]
    return statistics.paired_difference(
        first.correct, second.correct[:, order_Q], pair_seeds=first.seeds == second.seeds
    )
