"""What a run folder says about itself, and what came of the run: all a report needs.

`run.json` is written before the first stage, so that a run that was stopped, at whatever
point, can be reported from its folder alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from headwater.errors import BudgetExhausted, InputError
from headwater.ledger import Ledger
from headwater.types import AttemptTable
from headwater.workflow.graph import ArmPlan, BasePlan, Graph, Role, StageNode
from headwater.workflow.store import ArtifactStore
from headwater.workflow.study import Study

RUN_FILE = "run.json"
LEDGER_FILE = "ledger.sqlite"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ContrastRecord:
    """A comparison the recipe declares between two arms of the run."""

    better: str
    than: str
    differs_in: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run as planned: `run.json`."""

    name: str
    question: str | None
    titles: Mapping[str, str]
    seeds: tuple[int, ...]
    graph: Graph
    contrasts: tuple[ContrastRecord, ...]
    pools: Mapping[str, int]
    contamination: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """One model on one evaluation set, over the seeds that were evaluated.

    arm: an arm's name, or `base_MODEL` for a base no arm is about. chain: what was trained
    how. spent: the ledger's counters for one seed (the mean over seeds), shared stages
    included. stages, evaluations: fingerprints.
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
    warnings: tuple[str, ...] = ()
    stopped: BudgetExhausted | None = field(default=None, compare=False)


def record_of(study: Study, threads: int) -> RunRecord:
    """The record of a study about to be run with so many threads a stage."""
    recipe = study.recipe
    arms = {plan.arm for plan in study.graph.arms}
    return RunRecord(
        name=recipe.name,
        question=recipe.question,
        titles={name: recipe.arms[name].title or name for name in recipe.arms if name in arms},
        seeds=tuple(dict.fromkeys(plan.seed for plan in study.graph.arms)),
        graph=study.graph,
        contrasts=tuple(
            ContrastRecord(contrast.better, contrast.than, contrast.differs_in)
            for contrast in recipe.contrasts
            if contrast.better in arms and contrast.than in arms
        ),
        pools=study.pool_sizes(),
        contamination=study.contamination,
        warnings=study.warnings,
        machine=_machine(threads),
    )


def write_record(record: RunRecord, run_dir: Path) -> None:
    """Write RUN/run.json, whole or not at all."""
    graph = record.graph
    plain = {name: value for name, value in vars(record).items() if name != "graph"}
    plain |= {
        "format": _FORMAT,
        "contrasts": [asdict(contrast) for contrast in record.contrasts],
        "nodes": [asdict(node) for node in graph.nodes.values()],
        "arms": [asdict(plan) for plan in graph.arms],
        "bases": [asdict(plan) for plan in graph.bases],
    }
    beside = run_dir / f"{RUN_FILE}.part"
    beside.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    beside.replace(run_dir / RUN_FILE)


def read_record(run_dir: Path) -> RunRecord:
    """Read RUN/run.json. Raises InputError where there is none or it cannot be read."""
    path = run_dir / RUN_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing; give the folder of a run (headwater run --out)")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        nodes = [StageNode(**node) for node in plain.pop("nodes")]
        graph = Graph(
            {node.fingerprint: node for node in nodes},
            tuple(ArmPlan(**arm) for arm in plain.pop("arms")),
            tuple(BasePlan(**base) for base in plain.pop("bases")),
        )
        contrasts = tuple(
            ContrastRecord(c["better"], c["than"], tuple(c["differs_in"] or ()) or None)
            for c in plain.pop("contrasts")
        )
        plain |= {name: tuple(plain[name]) for name in ("seeds", "contamination", "warnings")}
        return RunRecord(graph=graph, contrasts=contrasts, **plain)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); run the recipe again to write it anew"
        ) from error


def load_outcome(run_dir: Path, stopped: BudgetExhausted | None = None) -> RunOutcome:
    """What a run folder holds so far. Raises InputError for a folder that is no run."""
    record = read_record(run_dir)
    store = ArtifactStore(run_dir)
    published = {f for f in record.graph.nodes if store.get(f) is not None}
    with Ledger(run_dir / LEDGER_FILE) as ledger:
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
            warnings=(*record.warnings, *rows.missing, *_lost(ledger, record.graph, published)),
            stopped=stopped,
        )


def _lost(ledger: Ledger, graph: Graph, published: set[str]) -> tuple[str, ...]:
    """A warning where finished stages are in no account: the ledger was lost or replaced."""
    lost = ledger.without_account(f for f in graph.nodes if f in published)
    if not lost:
        return ()
    return (
        f"the ledger has no account of {len(lost)} finished stages (first: "
        f"{graph.describe(lost[0])}): what they spent is missing from every total and budget; "
        f"restore {LEDGER_FILE}, or run again in an empty folder",
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
        for name, title in self._record.titles.items():
            plans = [plan for plan in graph.arms if plan.arm == name]
            ends = {plan.seed: (plan.endpoint, plan.evaluations) for plan in plans}
            rows += self._of(name, title, plans[0].evaluates, ends)
        for name, title in self._record.titles.items():
            plans = [plan for plan in graph.arms if plan.arm == name]
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
        spendings = [self._ledger.spending(graph.closure([end])).as_dict() for end in ends]
        spent = {
            name: sum(spending[name] for spending in spendings) / len(spendings)
            for name in spendings[0]
        }
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
            spent={name: int(v) if v == int(v) else v for name, v in spent.items()},
            stages=graph.closure(ends),
            evaluations=evaluations,
        )


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
    for path in paths:
        table = parquet.read_table(path, columns=["problem_id", "attempt", *layers])
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        found = tuple(dict.fromkeys(columns["problem_id"].tolist()))
        attempts = len(columns["problem_id"]) // max(1, len(found))
        ids = ids or found
        if set(found) != set(ids) or attempts * len(ids) != len(columns["problem_id"]):
            raise InputError(
                f"{path}: not as many attempts for each of the {len(ids)} problems; remove this "
                "artifact and run again"
            )
        place = {problem_id: index for index, problem_id in enumerate(ids)}
        rows_N = [place[problem_id] for problem_id in columns["problem_id"]]
        order_N = np.lexsort((columns["attempt"], rows_N))
        for name, kept in layers.items():
            kept.append(columns[name][order_N].reshape(len(ids), attempts))
    return AttemptTable(
        problem_ids=ids,
        seeds=seeds,
        verdicts=np.stack(layers["verdict"]).astype(str),
        response_tokens=np.stack(layers["response_tokens"]).astype(np.int32),
        truncated=np.stack(layers["truncated"]).astype(bool),
    )


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


def _machine(threads: int) -> dict[str, Any]:
    """Processor, threads of a stage, and versions of the libraries that decide numbers."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 1,
        "threads": threads,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
