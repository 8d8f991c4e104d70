"""From what the workflow knows of a run to what results.json says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headwater.report.analysis import RunRecord, build_results
from headwater.report.comparing import ArmEvaluation
from headwater.report.dynamics import dynamics_of
from headwater.report.results import (
    AlertRow,
    Distance,
    LedgerTotals,
    Machine,
    ProbeRow,
    Results,
    Route,
    StageRow,
)
from headwater.stages.alerts import read_alerts
from headwater.workflow.graph import Graph, StageNode
from headwater.workflow.outcome import ProbeOutcome, RowOutcome, RunOutcome
from headwater.workflow.routes import route_of


def results_of(outcome: RunOutcome) -> Results:
    """Every estimate and difference of a run, as far as it has come.

    Contrasts whose arms were not both evaluated yet are left out. Rows: base models that no arm
    is about, then the arms in the recipe's order, then teachers of arms that no row showed yet.
    """
    record = outcome.record
    rows = sorted(outcome.rows, key=lambda row: _place(row, outcome))
    evaluated = {row.arm for row in rows}
    machine = record.machine
    alerts = alerts_of(outcome)
    stages = tuple(
        StageRow(
            fingerprint=stage.fingerprint,
            kind=stage.kind,
            model=stage.model,
            pool=stage.pool,
            seed=stage.seed,
            used_by=stage.used_by,
            seconds=stage.seconds,
            spent=dict(stage.spent),
        )
        for stage in outcome.stages
    )
    return build_results(
        RunRecord(
            name=record.name,
            question=record.question,
            seeds=record.seeds,
            machine=Machine(
                cpu=machine["cpu"],
                threads=machine["threads"],
                torch=machine["torch"],
                transformers=machine["transformers"],
            ),
            evaluations=tuple(_evaluation(row) for row in rows),
            contrasts=tuple(
                contrast
                for contrast in record.contrasts
                if {contrast.better, contrast.than} <= evaluated
            ),
            stages=stages,
            ledger=LedgerTotals(
                physical=dict(outcome.physical),
                training=dict(outcome.training),
                evaluation=dict(outcome.evaluation),
            ),
            pools=record.pools,
            contamination=record.contamination,
            warnings=outcome.warnings,
            hypotheses=record.hypotheses,
            map=record.map,
            routes=_routes(record.graph, evaluated),
            probes=tuple(_probe(one) for one in outcome.probes),
            dynamics=dynamics_of(stages, outcome.run_dir, alerts),
            alerts=alerts,
        )
    )


def alerts_of(outcome: RunOutcome) -> tuple[AlertRow, ...]:
    """What guards said of every published stage, in the order of the stages.

    Raises InputError for a file of alerts that cannot be read.
    """
    return tuple(
        AlertRow(
            stage=stage.fingerprint,
            guard=alert.guard,
            quantity=alert.quantity,
            step=alert.step,
            value=alert.value,
            threshold=alert.threshold,
            words=alert.words,
        )
        for stage in outcome.stages
        for alert in read_alerts(outcome.run_dir / "artifacts" / stage.fingerprint)
    )


def _place(row: RowOutcome, outcome: RunOutcome) -> int:
    if row.arm not in outcome.record.titles:
        return 0
    own = outcome.record.titles[row.arm] == row.title
    return 1 if own else 2


def _evaluation(row: RowOutcome) -> ArmEvaluation:
    return ArmEvaluation(
        arm=row.arm,
        title=row.title,
        evaluates="teacher" if row.evaluates == "teacher" else "student",
        eval_set=row.eval_set,
        table=row.table,
        chain=row.chain,
        spent=row.spent,
        stages=row.stages,
        evaluations=row.evaluations,
        model=row.model,
        spent_after_bases=row.spent_after_bases,
    )


def _routes(graph: Graph, arms: set[str]) -> tuple[Route, ...]:
    """One route an arm; seeds differ in fingerprints only."""
    plans = {plan.arm: plan for plan in reversed(graph.arms) if plan.arm in arms}
    routes = {arm: route_of(graph, plan) for arm, plan in plans.items()}
    return tuple(
        Route(
            arm=arm,
            base=route.base,
            teacher_base=route.teacher_words,
            taught_by=_words(route.taught_by),
            transfers=_words(route.transfers),
            others=_words(route.others),
        )
        for arm, route in reversed(routes.items())
    )


def _words(nodes: Sequence[StageNode]) -> tuple[str, ...]:
    return tuple(f"{node.kind}({node.pool})" for node in nodes)


def _probe(outcome: ProbeOutcome) -> ProbeRow:
    positions = zip(*(found["positions"] for found in outcome.found), strict=True)
    return ProbeRow(
        arm=outcome.arm,
        after=outcome.after,
        overall=_distance(outcome.found),
        positions=tuple(_distance(seeds) for seeds in positions),
        artifacts=outcome.artifacts,
    )


def _distance(seeds: Sequence[Mapping[str, Any]]) -> Distance:
    """The mean over seeds."""
    return Distance(
        **{name: float(np.mean([seed[name] for seed in seeds])) for name in Distance.model_fields}
    )
