"""What came of a run so far, read from its folder: rows, stages, spending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from headwater.errors import BudgetExhausted, InputError
from headwater.ledger import Ledger
from headwater.ledger.statement import check_ledger
from headwater.plain_json import read_json_file
from headwater.types import AttemptTable
from headwater.workflow.confinement import require_own_files
from headwater.workflow.graph import PROBE_FILE, ArmPlan, Graph, Role
from headwater.workflow.record import LEDGER_FILE, RunRecord, read_record
from headwater.workflow.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """One model on one evaluation set, over the seeds that were evaluated.

    arm: an arm's name, or `base_MODEL` for a base no arm is about. chain: what was trained
    how. spent: the ledger's counters for one seed (the mean over seeds), shared stages
    included. stages, evaluations: fingerprints. model: the name of its base.
    spent_after_bases leaves out what made the bases, which is before any arm.
    """

    arm: str
    title: str
    evaluates: str  # "teacher" or "student"
    eval_set: str
    table: AttemptTable
    chain: tuple[str, ...]
    spent: Mapping[str, float]
    stages: tuple[str, ...]
    evaluations: tuple[str, ...]
    model: str = ""
    spent_after_bases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """C2 of one arm at one moment: a probe.json for each seed, and their fingerprints."""

    arm: str
    after: str
    found: tuple[Mapping[str, Any], ...]
    artifacts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """One published stage and what it spent; `used_by` are arms."""

    fingerprint: str
    kind: str
    model: str
    pool: str | None
    seed: int
    used_by: tuple[str, ...]
    seconds: float
    spent: Mapping[str, float]


@dataclass(frozen=True)
class RunOutcome:
    """What came of a run. `stopped` is the budget that ended it early, if one did.

    physical, training and evaluation are totals over the run's own graph: a folder may hold
    stages of an earlier recipe as well.
    """

    run_dir: Path
    record: RunRecord
    rows: tuple[RowOutcome, ...]
    stages: tuple[StageOutcome, ...]
    physical: Mapping[str, float]
    training: Mapping[str, float]
    evaluation: Mapping[str, float]
    probes: tuple[ProbeOutcome, ...] = ()
    warnings: tuple[str, ...] = ()
    stopped: BudgetExhausted | None = field(default=None, compare=False)


def load_outcome(run_dir: Path, stopped: BudgetExhausted | None = None) -> RunOutcome:
    """What a run folder holds so far.

    Raises InputError for a folder that is no run, or in which something leads out of it.
    """
    require_own_files(run_dir)
    record = read_record(run_dir)
    store = ArtifactStore(run_dir)
    published = {f for f in record.graph.nodes if store.get(f) is not None}
    with Ledger(run_dir / LEDGER_FILE) as ledger:
        check_ledger(ledger)
        rows = _Rows(record, store, ledger, published)
        return RunOutcome(
            run_dir=run_dir,
            record=record,
            rows=rows.all(),
            stages=tuple(
                _stage(record.graph, f, store, ledger) for f in record.graph.nodes if f in published
            ),
            physical=ledger.physical(stages=record.graph.nodes).as_dict(),
            training=ledger.spending(record.graph.nodes).as_dict(),
            evaluation=ledger.spending(record.graph.nodes, "eval").as_dict(),
            probes=_probes(record.graph, store, published),
            warnings=(*record.warnings, *rows.missing, *_lost(ledger, record.graph, published)),
            stopped=stopped,
        )


def _probes(graph: Graph, store: ArtifactStore, published: set[str]) -> tuple[ProbeOutcome, ...]:
    """Every probe that is published, its seeds together, in the order of arms and moments."""
    by_moment: dict[tuple[str, str], list[str]] = {}
    for plan in graph.arms:
        for after, fingerprint in plan.probes.items():
            if fingerprint in published:
                by_moment.setdefault((plan.arm, after), []).append(fingerprint)
    return tuple(
        ProbeOutcome(arm, after, tuple(read_probe(store, one) for one in found), tuple(found))
        for (arm, after), found in by_moment.items()
    )


def read_probe(store: ArtifactStore, fingerprint: str) -> Mapping[str, Any]:
    path = store.path(fingerprint) / PROBE_FILE
    try:
        found: Mapping[str, Any] = read_json_file(path)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}); remove this artifact and run again"
        ) from error
    return found


def _lost(ledger: Ledger, graph: Graph, published: set[str]) -> tuple[str, ...]:
    """A warning where finished stages are in no account: the ledger was lost or replaced."""
    lost = ledger.without_account(f for f in graph.nodes if f in published)
    if not lost:
        return ()
    return (
        f"the ledger has no account of {len(lost)} finished stages (first: "
        f"{graph.describe(lost[0])}): what they spent is missing from every total and budget; "
        f"restore {LEDGER_FILE}, or run again to take it from the stages' artifacts",
    )


class _Rows:
    """Collects the rows of a report: arms, their teachers, then bases no arm is about."""

    def __init__(
        self, record: RunRecord, store: ArtifactStore, ledger: Ledger, published: set[str]
    ) -> None:
        self._record = record
        self._store = store
        self._ledger = ledger
        self._published = published
        self._shown: set[str] = set()
        self.missing: list[str] = []

    def all(self) -> tuple[RowOutcome, ...]:
        """Every row there is an evaluation for; names the others in `missing`."""
        graph = self._record.graph
        rows: list[RowOutcome] = []
        plans_of: dict[str, list[ArmPlan]] = {}
        for plan in graph.arms:
            plans_of.setdefault(plan.arm, []).append(plan)
        for name, title in self._record.titles.items():
            plans = plans_of[name]
            ends = {plan.seed: (plan.endpoint, plan.evaluations) for plan in plans}
            rows += self._of(name, title, plans[0].evaluates, ends)
        for name, title in self._record.titles.items():
            plans = plans_of[name]
            teachers = {p.seed: (p.teacher, p.teacher_evaluations) for p in plans if p.teacher}
            trained = any(graph.nodes[end].role != "base" for end, _ in teachers.values())
            if trained and self._is_news(teachers):
                rows += self._of(name, f"{title}: its teacher", "teacher", teachers)
        for model in dict.fromkeys(base.model_name for base in graph.bases):
            bases = [base for base in graph.bases if base.model_name == model]
            ends = {base.seed: (base.model, base.evaluations) for base in bases}
            if self._is_news(ends):
                rows += self._of(f"base_{model}", f"base {model}", "teacher", ends)
        return tuple(rows)

    def _of(
        self,
        arm: str,
        title: str,
        evaluates: Role,
        ends: Mapping[int, tuple[str, Mapping[str, str]]],
    ) -> list[RowOutcome]:
        """Rows of one model over its seeds, one an evaluation set."""
        self._shown.update(end for end, _ in ends.values())
        rows = []
        for eval_set in next(iter(ends.values()))[1] if ends else ():
            by_seed = {
                seed: (end, evaluations[eval_set])
                for seed, (end, evaluations) in ends.items()
                if evaluations[eval_set] in self._published
            }
            if len(by_seed) < len(ends):
                lacking = ", ".join(str(seed) for seed in ends if seed not in by_seed)
                self.missing.append(f"{title} has no evaluation on {eval_set} for seed {lacking}")
            if by_seed:
                rows.append(self._row(arm, title, evaluates, eval_set, by_seed))
        return rows

    def _is_news(self, ends: Mapping[int, tuple[str, Mapping[str, str]]]) -> bool:
        """Whether some seed's model is not in a row yet."""
        return not self._shown.issuperset(end for end, _ in ends.values())

    def _row(
        self,
        arm: str,
        title: str,
        evaluates: Role,
        eval_set: str,
        by_seed: Mapping[int, tuple[str, str]],
    ) -> RowOutcome:
        graph = self._record.graph
        ends = [end for end, _ in by_seed.values()]
        made = [graph.closure([end]) for end in ends]
        after = [[one for one in stages if graph.nodes[one].role != "base"] for stages in made]
        evaluations = tuple(evaluation for _, evaluation in by_seed.values())
        return RowOutcome(
            arm=arm,
            title=title,
            evaluates=evaluates,
            eval_set=eval_set,
            table=read_attempts(
                [self._store.path(e) / "attempts.parquet" for e in evaluations], tuple(by_seed)
            ),
            chain=chain_words(graph, ends[0], evaluates),
            spent=self._mean_spending(made),
            spent_after_bases=self._mean_spending(after),
            stages=graph.closure(ends),
            evaluations=evaluations,
            model=graph.nodes[ends[0]].model_name,
        )

    def _mean_spending(self, seeds: Sequence[Sequence[str]]) -> dict[str, float]:
        """Counters of these stages for one seed, the mean over seeds."""
        found = [self._ledger.spending(stages).as_dict() for stages in seeds]
        means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        return {name: int(mean) if mean == int(mean) else mean for name, mean in means.items()}


def chain_words(graph: Graph, endpoint: str, evaluates: Role) -> tuple[str, ...]:
    """How a model and its teacher were trained after their bases, such as "teacher: grpo(labels)".

    A stage may be one arm's teacher and another's student: the way to `endpoint` says which.
    """
    own = set()
    ancestor: str | None = endpoint
    while ancestor is not None:
        own.add(ancestor)
        ancestor = graph.nodes[ancestor].model
    return tuple(
        f"{evaluates if node.fingerprint in own else 'teacher'}: {node.kind}({node.pool})"
        for node in (graph.nodes[fingerprint] for fingerprint in graph.closure([endpoint]))
        if node.role != "base" and node.kind != "teacher_rollouts"
    )


def read_attempts(paths: Sequence[Path], seeds: tuple[int, ...]) -> AttemptTable:
    """The attempts of one model's evaluations, one file a seed, as one table [S, Q, A].

    Raises InputError where the files are about different problems or lack attempts.
    """
    ids: tuple[str, ...] = ()
    layers: dict[str, list[np.ndarray]] = {"verdict": [], "response_tokens": [], "truncated": []}
    votes_known = all("vote" in parquet.read_schema(path).names for path in paths)
    if votes_known:
        layers["vote"] = []
    for path in paths:
        table = parquet.read_table(path, columns=["problem_id", "attempt", *layers])
        columns = {name: _values(table.column(name)) for name in table.column_names}
        found = tuple(dict.fromkeys(columns["problem_id"].tolist()))
        attempts = len(columns["problem_id"]) // max(1, len(found))
        ids = ids or found
        if set(found) != set(ids) or attempts * len(ids) != len(columns["problem_id"]):
            raise InputError(
                f"{path}: not as many attempts for each of the {len(ids)} problems; remove this "
                "artifact and run again"
            )
        place = {problem_id: index for index, problem_id in enumerate(ids)}
        rows_N = np.array([place[problem_id] for problem_id in columns["problem_id"]])
        order_N = np.lexsort((columns["attempt"], rows_N))
        for name, kept in layers.items():
            kept.append(columns[name][order_N].reshape(len(ids), attempts))
    return AttemptTable(
        problem_ids=ids,
        seeds=seeds,
        verdicts=np.stack(layers["verdict"]).astype(str),
        response_tokens=np.stack(layers["response_tokens"]).astype(np.int32),
        truncated=np.stack(layers["truncated"]).astype(bool),
        votes=np.stack(layers["vote"]).astype(np.int32) if votes_known else None,
    )


def _values(column: Any) -> np.ndarray:
    """A column as numpy; numbers that are missing are -1."""
    filled: np.ndarray = (column.fill_null(-1) if column.null_count else column).to_numpy()
    return filled


def _stage(graph: Graph, fingerprint: str, store: ArtifactStore, ledger: Ledger) -> StageOutcome:
    node = graph.nodes[fingerprint]
    kind = "eval" if node.is_evaluation else "train"
    return StageOutcome(
        fingerprint=fingerprint,
        kind=node.kind,
        model=node.model_name,
        pool=node.pool or node.eval_set,
        seed=node.seed,
        used_by=graph.users[fingerprint],
        seconds=float(store.manifest(fingerprint).get("seconds", 0.0)),
        spent=ledger.spending([fingerprint], kind).as_dict(),  # type: ignore[arg-type]
    )
