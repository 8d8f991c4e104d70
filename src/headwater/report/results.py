"""results.json: what a run found, what it spent and where each number comes from.

The models are strict and versioned, so that a file of another version is refused and not half
understood. `report.analysis` fills them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from headwater import __version__
from headwater.errors import InputError
from headwater.plain_json import read_json_file
from headwater.storage import write_whole

RESULTS_FILE = "results.json"
SCHEMA = 2

Fingerprint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Spent = dict[str, int | float]  # the ledger's counters by name
Evaluated = Literal["teacher", "student"]
Judgement = Literal["supported", "refuted", "undecided"]


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
    (the mean over seeds), shared stages included; `spent_after_bases` leaves out what made the
    bases. `stages` and `evaluations` are artifact fingerprints. maj_at_k: how often the most
    frequent answer is right, a tie drawn by lot; None for evaluations older than votes.
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
    spent_after_bases: Spent = Field(default_factory=dict)
    maj_at_k: Share | None = None


class DifferenceRow(_Record):
    """A contrast: avg@k of `better` minus that of `than` on the same problems.

    p_value covers problems and training luck, p_problems problems alone (is it real for these
    checkpoints); p_value_corrected is Holm's over all differences of the run, and for a claim with
    not_worse_by it is of that claim. minimum_detectable is the true difference that four in five
    such studies would find. match: accounts on which `than` was made to equal `better`.
    """

    better: str
    than: str
    eval_set: str
    difference: float
    interval: tuple[float, float]
    standard_error: float
    degrees_of_freedom: float | None
    p_value: float
    p_problems: float
    p_value_corrected: float
    minimum_detectable: float
    verdict: Judgement
    differs_in: tuple[str, ...] | None = None
    match: tuple[str, ...] = ()
    not_worse_by: float | None = None

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out zero and the corrected p-value is at most 0.05."""
        apart = not self.interval[0] <= 0.0 <= self.interval[1]
        return apart and self.verdict != "undecided"


class HypothesisRow(_Record):
    """A declared hypothesis and how it came out: supported if every claim is, refuted if any is.

    claims: its differences, as places in `Results.differences`.
    """

    name: str
    statement: str
    verdict: Judgement
    eval_set: str
    claims: tuple[int, ...]


class MapCell(_Record):
    """One student and number of labels: the rule's arm minus the other's.

    outcome: by the 95 % interval and Holm's p-value over the cells of the map.
    """

    student: str
    labels: int
    base_rate: Share
    rule: Share
    against: Share
    difference: float
    interval: tuple[float, float]
    p_value_corrected: float
    outcome: Literal["wins", "ties", "loses"]


class MapResult(_Record):
    """Where the rule holds: its cells by student and number of labels, on one evaluation set."""

    rule: str
    against: str
    eval_set: str
    cells: tuple[MapCell, ...]


class Route(_Record):
    """What an arm is, for tables: bases, and stages as KIND(POOL).

    teacher_base is None for an arm without a teacher; `taught_by` is empty for a raw one.
    """

    arm: str
    base: str
    teacher_base: str | None
    taught_by: tuple[str, ...]
    transfers: tuple[str, ...]
    others: tuple[str, ...]


class Distance(_Record):
    """How far a student was from its teacher on its own rollouts, averaged over seeds.

    KLs and entropies in nats a token; shares of the 16 likeliest tokens and of their mass.
    """

    forward_kl: float
    reverse_kl: float
    entropy: float
    teacher_entropy: float
    top_overlap: Share
    overlap_mass: float


class ProbeRow(_Record):
    """C2: the distance at one moment of an arm's transfer; `positions` are parts of a response.

    after: "start" or the transfer stage that was just done. artifacts: one fingerprint a seed.
    """

    arm: str
    after: str
    overall: Distance
    positions: tuple[Distance, ...]
    artifacts: tuple[Fingerprint, ...]


class GainRow(_Record):
    """C1: what a teacher's training gained over its base, on one evaluation set."""

    model: str
    taught_by: tuple[str, ...]
    eval_set: str
    before: Share
    after: Share
    difference: float
    interval: tuple[float, float]
    arms: tuple[str, ...]


class DynamicsRow(_Record):
    """What to watch of one stage over its seeds: means over the last quarter of its steps.

    None where the stage does not log it. alarms: thresholds passed, in words.
    """

    kind: str
    model: str
    pool: str | None
    used_by: tuple[str, ...]
    pass_rate: float | None
    zero_variance_share: float | None
    truncation_rate: float | None
    repetition: float | None
    response_tokens: float | None
    entropy: float | None
    sampler_gap: float | None
    grad_norm: float | None
    alarms: tuple[str, ...]
    artifacts: tuple[Fingerprint, ...]


class AlertRow(_Record):
    """What a guard said of a stage while it trained; `words` have causes and cures as well.

    step counts from 1; value was found beyond threshold.
    """

    stage: Fingerprint
    guard: str
    quantity: str
    step: int
    value: float
    threshold: float
    words: str


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

    schema_version: Literal[2] = Field(default=2, alias="schema")
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
    hypotheses: tuple[HypothesisRow, ...] = ()
    map: MapResult | None = None
    routes: tuple[Route, ...] = ()
    gains: tuple[GainRow, ...] = ()
    probes: tuple[ProbeRow, ...] = ()
    dynamics: tuple[DynamicsRow, ...] = ()
    alerts: tuple[AlertRow, ...] = ()
    contamination: tuple[dict[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def eval_sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets, in the order of their first row."""
        return tuple(dict.fromkeys(row.eval_set for row in self.rows))

    def titles(self) -> dict[str, str]:
        """Arm name -> title; an arm whose teacher is evaluated too goes by its student's."""
        students_last = sorted(self.rows, key=lambda row: row.evaluates == "student")
        return {row.arm: row.title for row in students_last}


def write_results(results: Results, run_dir: Path) -> Path:
    """Write RUN/results.json, whole or not at all, and return its path."""
    path = run_dir / RESULTS_FILE
    plain = results.model_dump(mode="json", by_alias=True)
    write_whole(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
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
        content = read_json_file(path)
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
