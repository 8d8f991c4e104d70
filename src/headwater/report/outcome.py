"""From what the workflow knows of a run to what results.json says of it."""

from __future__ import annotations

from headwater.report.results import (
    ArmEvaluation,
    LedgerTotals,
    Machine,
    Results,
    RunRecord,
    StageRow,
    build_results,
)
from headwater.workflow.record import RowOutcome, RunOutcome


def results_of(outcome: RunOutcome) -> Results:
    """Every estimate and difference of a run, as far as it has come.

    Contrasts whose arms were not both evaluated yet are left out. Rows: base models that no arm
    is about, then the arms in the recipe's order, then teachers of arms that no row showed yet.
    """
    record = outcome.record
    rows = sorted(outcome.rows, key=lambda row: _place(row, outcome))
    evaluated = {row.arm for row in rows}
    machine = record.machine
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
            stages=tuple(
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
            ),
            ledger=LedgerTotals(
                physical=dict(outcome.physical),
                training=dict(outcome.training),
                evaluation=dict(outcome.evaluation),
            ),
            pools=record.pools,
            contamination=record.contamination,
            warnings=outcome.warnings,
        )
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
    )
