"""What an evaluated study comes to, as runs of a tracker: one for every model in its table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from headwater.evals.statistics import avg_at_k, pass_at_k
from headwater.tracking.backends import TrackedRun
from headwater.workflow.outcome import RowOutcome, RunOutcome

#: Kind of these runs, beside the kinds of stages.
RESULTS = "results"


def result_runs(
    outcome: RunOutcome, study: str
) -> Iterator[tuple[str, TrackedRun, dict[str, float]]]:
    """(key, run, values) of every arm's model over all its evaluation sets.

    Values are named alike in all runs, so that a chart compares arms: eval/SET/avg_at_K and
    pass_at_K, shares of 1, each with its standard error over problems as NAME_stderr.
    """
    by_model: dict[tuple[str, str], list[RowOutcome]] = {}
    for row in outcome.rows:
        by_model.setdefault((row.arm, row.evaluates), []).append(row)
    for (arm, evaluates), rows in by_model.items():
        first = rows[0]
        config: dict[str, Any] = {
            "arm": arm,
            "title": first.title,
            "model": first.model,
            "evaluates": evaluates,
        }
        config["chain"] = "; ".join(first.chain)
        config |= {f"spent.{name}": value for name, value in first.spent.items()}
        values = {name: value for row in rows for name, value in _values(row).items()}
        name = f"{arm}/{RESULTS}-{evaluates}"
        key = f"{RESULTS}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        yield key, TrackedRun(study, name, RESULTS, (arm, evaluates), config), values


def _values(row: RowOutcome) -> dict[str, float]:
    correct_SQA = row.table.correct
    attempts = correct_SQA.shape[2]
    values = {}
    for name, found in (
        (f"avg_at_{attempts}", avg_at_k(correct_SQA)),
        (f"pass_at_{attempts}", pass_at_k(correct_SQA, attempts)),
    ):
        values[f"eval/{row.eval_set}/{name}"] = found.mean
        if not math.isnan(found.standard_error):
            values[f"eval/{row.eval_set}/{name}_stderr"] = found.standard_error
    return values
