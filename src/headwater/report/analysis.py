"""From verdict tables and accounts to estimates, differences and verdicts; pure and seeded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from headwater import __version__
from headwater.config.claims import Contrast, Hypothesis, MapSpec
from headwater.evals import statistics
from headwater.evals.answers import ballots
from headwater.evals.statistics import majority_score
from headwater.report.comparing import ArmEvaluation, Tables, compare, gains_of, judge, map_of
from headwater.report.results import (
    AlertRow,
    DynamicsRow,
    LedgerTotals,
    Machine,
    ProbeRow,
    Results,
    Route,
    Row,
    StageRow,
)
from headwater.types import AttemptTable, Verdict


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything `build_results` needs."""

    name: str
    seeds: tuple[int, ...]
    machine: Machine
    evaluations: tuple[ArmEvaluation, ...]
    contrasts: tuple[Contrast, ...]
    stages: tuple[StageRow, ...]
    ledger: LedgerTotals
    pools: Mapping[str, int]
    contamination: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    question: str | None = None
    hypotheses: Mapping[str, Hypothesis] = field(default_factory=dict)
    map: MapSpec | None = None
    routes: tuple[Route, ...] = ()
    probes: tuple[ProbeRow, ...] = ()
    dynamics: tuple[DynamicsRow, ...] = ()
    alerts: tuple[AlertRow, ...] = ()


def build_results(run: RunRecord) -> Results:
    """Estimates, differences and accounts of a run; pure and seeded.

    Raises InputError when a contrast names an arm that was not evaluated or two arms were
    evaluated on different problems.
    """
    tables = Tables(run.evaluations)
    found = compare(run.contrasts, tables)
    return Results(
        name=run.name,
        headwater=__version__,
        seeds=run.seeds,
        machine=run.machine,
        question=run.question,
        rows=tuple(_row(evaluation) for evaluation in run.evaluations),
        differences=found,
        stages=run.stages,
        ledger=run.ledger,
        pools=dict(run.pools),
        contamination=tuple(dict(entry) for entry in run.contamination),
        warnings=run.warnings,
        hypotheses=judge(run.hypotheses, found),
        map=None if run.map is None else map_of(run.map, tables),
        routes=run.routes,
        gains=gains_of(tables),
        probes=run.probes,
        dynamics=run.dynamics,
        alerts=run.alerts,
    )


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
        maj_at_k=_majority_right(table),
        truncated_share=float(np.mean(table.truncated)),
        unparseable_share=_share_of(table, Verdict.UNPARSEABLE),
        timeout_share=_share_of(table, Verdict.TIMEOUT),
        mean_response_tokens=float(np.mean(table.response_tokens)),
        chain=evaluation.chain,
        spent=dict(evaluation.spent),
        spent_after_bases=dict(evaluation.spent_after_bases),
        stages=evaluation.stages,
        evaluations=evaluation.evaluations,
    )


def _majority_right(table: AttemptTable) -> float | None:
    if table.votes is None:
        return None
    scores = [
        majority_score(votes_A, correct_A)
        for votes_QA, correct_QA in zip(table.votes, table.correct, strict=True)
        for votes_A, correct_A in zip(ballots(votes_QA), correct_QA, strict=True)
    ]
    return float(np.mean(scores))


def _share_of(table: AttemptTable, verdict: Verdict) -> float:
    return float(np.mean(table.verdicts == verdict.value))
