"""Arms against each other: differences, hypotheses, what teachers gained, and the map; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headwater.config.claims import Contrast, Hypothesis, MapSpec, base_arm, cell_arm
from headwater.errors import InputError
from headwater.evals import statistics
from headwater.report.results import (
    DifferenceRow,
    Evaluated,
    GainRow,
    HypothesisRow,
    Judgement,
    MapCell,
    MapResult,
)
from headwater.types import AttemptTable

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class ArmEvaluation:
    """What the workflow knows of one arm's model on one evaluation set.

    chain: what was trained how, such as "teacher: grpo(labels)". spent: the arm's logical
    spending for one seed. model: the name of its base. stages: fingerprints of its stages;
    evaluations: those of the evaluation artifacts whose rollouts can be read.
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
    model: str = ""
    spent_after_bases: Mapping[str, float] = field(default_factory=dict)


class Tables:
    """Evaluations by arm and set: an arm's student where it has one, else its teacher."""

    def __init__(self, evaluations: Sequence[ArmEvaluation]) -> None:
        self.all = tuple(evaluations)
        self.eval_sets = tuple(dict.fromkeys(one.eval_set for one in evaluations))
        self._of: dict[tuple[str, str], ArmEvaluation] = {}
        for one in evaluations:
            key = one.arm, one.eval_set
            if key not in self._of or one.evaluates == "student":
                self._of[key] = one

    def sets_of(self, better: str, than: str) -> tuple[str, ...]:
        """Evaluation sets that both arms were evaluated on.

        Raises InputError for an arm that was not evaluated at all.
        """
        known = dict.fromkeys(arm for arm, _ in self._of)
        for arm in (better, than):
            if arm not in known:
                raise InputError(
                    f"contrast names arm {arm!r}, which was not evaluated; evaluated arms: "
                    f"{', '.join(known)}"
                )
        return tuple(
            name for name in self.eval_sets if {(better, name), (than, name)} <= set(self._of)
        )

    def get(self, arm: str, eval_set: str) -> ArmEvaluation | None:
        """One arm on one set, or None."""
        return self._of.get((arm, eval_set))

    def difference(self, better: str, than: str, eval_set: str) -> statistics.Difference:
        """Paired by problem, and by seed where both arms have the same."""
        return _paired(self._of[better, eval_set], self._of[than, eval_set])


def _paired(better: ArmEvaluation, than: ArmEvaluation) -> statistics.Difference:
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


# --- differences and hypotheses ------------------------------------------------------------------


def compare(contrasts: Sequence[Contrast], tables: Tables) -> tuple[DifferenceRow, ...]:
    """Every distinct contrast on every set that has both arms, corrected together (Holm).

    Raises InputError for arms that were not evaluated, or on different problems.
    """
    distinct: dict[_Pair, list[Contrast]] = {}
    for contrast in contrasts:
        distinct.setdefault(_pair(contrast), []).append(contrast)
    found = [
        (pair, same, eval_set, tables.difference(pair[0], pair[1], eval_set))
        for pair, same in distinct.items()
        for eval_set in tables.sets_of(pair[0], pair[1])
    ]
    corrected = statistics.holm([_claim_p(pair, one) for pair, *_, one in found])
    return tuple(
        DifferenceRow(
            better=pair[0],
            than=pair[1],
            eval_set=eval_set,
            difference=one.mean,
            interval=(one.low, one.high),
            standard_error=one.standard_error,
            degrees_of_freedom=one.degrees_of_freedom
            if math.isfinite(one.degrees_of_freedom)
            else None,
            p_value=_claim_p(pair, one),
            p_problems=one.p_problems,
            p_value_corrected=p_value,
            minimum_detectable=one.minimum_detectable(len(found)),
            verdict=_verdict(pair, one, p_value, len(found)),
            differs_in=same[0].differs_in,
            match=tuple(contrast.match for contrast in same if contrast.match is not None),
            not_worse_by=pair[2],
        )
        for (pair, same, eval_set, one), p_value in zip(found, corrected, strict=True)
    )


_Pair = tuple[str, str, float | None]  # better, than, not_worse_by: what makes a comparison


def _pair(contrast: Contrast) -> _Pair:
    return contrast.better, contrast.than, contrast.not_worse_by


def _claim_p(pair: _Pair, found: statistics.Difference) -> float:
    """Of no difference, two-sided; with `not_worse_by`, of being behind by that much, one-sided."""
    margin = pair[2]
    return found.p_value if margin is None else found.p_not_below(margin)


def _verdict(
    pair: _Pair, found: statistics.Difference, p_corrected: float, comparisons: int
) -> Judgement:
    """A difference decides when corrected p-value and interval agree.

    A claim not to be behind by a margin is refuted by being behind at all, beyond chance.
    """
    behind = found.high < 0.0
    if pair[2] is None:
        if p_corrected > SIGNIFICANCE or found.low <= 0.0 <= found.high:
            return "undecided"
        return "refuted" if behind else "supported"
    if p_corrected <= SIGNIFICANCE:
        return "supported"
    reversed_ = behind and found.p_value * comparisons <= SIGNIFICANCE
    return "refuted" if reversed_ else "undecided"


def judge(
    hypotheses: Mapping[str, Hypothesis], differences: Sequence[DifferenceRow]
) -> tuple[HypothesisRow, ...]:
    """Each hypothesis on each set where all of its claims were compared."""
    place = {
        ((row.better, row.than, row.not_worse_by), row.eval_set): index
        for index, row in enumerate(differences)
    }
    sets = dict.fromkeys(row.eval_set for row in differences)
    rows = []
    for name, hypothesis in hypotheses.items():
        for eval_set in sets:
            keys = [(_pair(claim), eval_set) for claim in hypothesis.claims]
            if not set(keys) <= set(place):
                continue
            claims = tuple(place[key] for key in keys)
            verdicts = {differences[index].verdict for index in claims}
            verdict: Judgement = "undecided"
            if "refuted" in verdicts:
                verdict = "refuted"
            elif verdicts == {"supported"}:
                verdict = "supported"
            rows.append(
                HypothesisRow(
                    name=name,
                    statement=hypothesis.statement,
                    verdict=verdict,
                    eval_set=eval_set,
                    claims=claims,
                )
            )
    return tuple(rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- what a teacher's training gained -------------------------------------------------------------


def gains_of(tables: Tables) -> tuple[GainRow, ...]:
    """C1: every trained teacher that was evaluated, against its base, on each set."""
    bases = {
        (one.model, one.eval_set): one
        for one in reversed(tables.all)
        if one.model and not one.chain
    }
    rows: dict[tuple[str, tuple[str, ...], str], GainRow] = {}
    for one in tables.all:
        base = bases.get((one.model, one.eval_set))
        if one.evaluates != "teacher" or not one.chain or base is None:
            continue
        taught_by = tuple(stage.partition(": ")[2] for stage in one.chain)
        found = _paired(one, base)
        key = one.model, taught_by, one.eval_set
        arms = (*rows[key].arms, one.arm) if key in rows else (one.arm,)
        rows[key] = GainRow(
            model=one.model,
            taught_by=taught_by,
            eval_set=one.eval_set,
            before=float(base.table.correct.mean()),
            after=float(one.table.correct.mean()),
            difference=found.mean,
            interval=(found.low, found.high),
            arms=arms,
        )
    return tuple(rows.values())


# --- the map -------------------------------------------------------------------------------------


def map_of(spec: MapSpec, tables: Tables) -> MapResult | None:
    """Every cell whose three arms were evaluated, on the first evaluation set; None without any."""
    if not tables.eval_sets:
        return None
    eval_set = tables.eval_sets[0]
    found = []
    for student in spec.students:
        for labels in spec.labels:
            rule, against = (cell_arm(one, student, labels) for one in (spec.rule, spec.against))
            three = [tables.get(arm, eval_set) for arm in (rule, against, base_arm(student))]
            if all(one is not None for one in three):
                means = [float(one.table.correct.mean()) for one in three if one is not None]
                found.append((student, labels, means, tables.difference(rule, against, eval_set)))
    corrected = statistics.holm([difference.p_value for *_, difference in found])
    cells = tuple(
        MapCell(
            student=student,
            labels=labels,
            rule=means[0],
            against=means[1],
            base_rate=means[2],
            difference=one.mean,
            interval=(one.low, one.high),
            p_value_corrected=p_value,
            outcome=_outcome(one, p_value),
        )
        for (student, labels, means, one), p_value in zip(found, corrected, strict=True)
    )
    return MapResult(rule=spec.rule, against=spec.against, eval_set=eval_set, cells=cells)


def _outcome(found: statistics.Difference, p_value: float) -> Literal["wins", "ties", "loses"]:
    if p_value > SIGNIFICANCE or found.low <= 0.0 <= found.high:
        return "ties"
    return "wins" if found.mean > 0.0 else "loses"
