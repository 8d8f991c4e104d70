"""A small study by hand: every kind of arm, two hypotheses, accounts, a map, diagnostics."""

from __future__ import annotations

from typing import Any

from headwater.report.results import (
    DifferenceRow,
    Distance,
    DynamicsRow,
    GainRow,
    HypothesisRow,
    LedgerTotals,
    Machine,
    MapCell,
    MapResult,
    ProbeRow,
    Results,
    Route,
    Row,
    StageRow,
)

WARMUP, OPD, SFT = "warmup(prompts)", "opd(prompts)", "sample_sft(prompts)"
BRIDGE = (WARMUP, OPD)

# arm: title, score, base, teacher, taught by, transfers, others
ARMS: dict[str, tuple[str, float, str, str | None, tuple[str, ...], tuple[str, ...], Any]] = {
    "s": ("Base student", 0.30, "student", None, (), (), ()),
    "c": ("Cold GRPO", 0.60, "student", None, (), (), ("grpo(labels)",)),
    "t": ("Direct GRPO on the teacher", 0.80, "teacher", None, (), (), ("grpo(labels)",)),
    "b0": ("Raw bridge", 0.35, "student", "teacher", (), BRIDGE, ()),
    "b1": ("SFT'd bridge", 0.50, "student", "teacher", ("sft(labels)",), BRIDGE, ()),
    "b2": ("Bridge", 0.70, "student", "teacher", ("grpo(labels)",), BRIDGE, ()),
    "o2": ("OPD only", 0.66, "student", "teacher", ("grpo(labels)",), (OPD,), ()),
    "h2": ("Sample SFT", 0.55, "student", "teacher", ("grpo(labels)",), (SFT,), ()),
    "p0": ("Half bridge", 0.58, "student", "teacher", ("grpo(1H)",), BRIDGE, ()),
    "p1": ("Half split", 0.68, "student", "teacher", ("grpo(1H)",), BRIDGE, ("grpo(2H)",)),
    "p2": ("Replay", 0.64, "student", "teacher", ("grpo(1H)",), BRIDGE, ("grpo(1H)",)),
    "q1": ("OPD split", 0.67, "student", "teacher", ("grpo(1H)",), (OPD,), ("grpo(2H)",)),
    "m1": ("Longer cold GRPO", 0.65, "student", None, (), (), ("grpo(labels)",)),
    "k1": ("Bridge: small, 16 labels", 0.4, "small", "teacher", ("grpo(labels:16)",), BRIDGE, ()),
    "k2": ("Cold: small, 16 labels", 0.45, "small", None, (), (), ("grpo(labels:16)",)),
}


def row(arm: str, **changes: Any) -> Row:
    title, score, base, *_, transfers, others = ARMS[arm]
    fields: dict[str, Any] = {
        "arm": arm,
        "title": title,
        "evaluates": "teacher" if base == "teacher" else "student",
        "eval_set": "sums",
        "attempts": 8,
        "problems": 100,
        "avg_at_k": score,
        "standard_error": 0.01,
        "interval": (score - 0.02, score + 0.02),
        "per_seed": (score - 0.01, score + 0.01),
        "pass_at_k": 0.9,
        "truncated_share": 0.0,
        "unparseable_share": 0.0,
        "timeout_share": 0.0,
        "mean_response_tokens": 30.0,
        "chain": tuple(f"student: {stage}" for stage in (*transfers, *others)),
        "spent": {"labels": 256, "verifier_calls": 6000, "generated_tokens": 200, "updates": 424},
        "spent_after_bases": {
            "labels": 256,
            "verifier_calls": 6000,
            "generated_tokens": 200,
            "updates": 24,
        },
        "stages": (f"st-{arm}",),
        "evaluations": (f"ev-{arm}",),
    }
    return Row(**(fields | changes))


def difference(better: str, than: str, value: float, verdict: str, **changes: Any) -> DifferenceRow:
    fields: dict[str, Any] = {
        "better": better,
        "than": than,
        "eval_set": "sums",
        "difference": value,
        "interval": (value - 0.03, value + 0.03),
        "standard_error": 0.01,
        "degrees_of_freedom": 4.0,
        "p_value": 0.002,
        "p_problems": 0.0001,
        "p_value_corrected": 0.01 if verdict != "undecided" else 0.4,
        "minimum_detectable": 0.05,
        "verdict": verdict,
    }
    return DifferenceRow(**(fields | changes))


def distance(reverse_kl: float) -> Distance:
    return Distance(
        forward_kl=2 * reverse_kl,
        reverse_kl=reverse_kl,
        entropy=0.5,
        teacher_entropy=0.4,
        top_overlap=0.75,
        overlap_mass=0.99,
    )


def dynamics(**changes: Any) -> DynamicsRow:
    fields: dict[str, Any] = {
        "kind": "grpo",
        "model": "student",
        "pool": "labels",
        "used_by": ("c",),
        "pass_rate": 0.6,
        "zero_variance_share": 0.2,
        "truncation_rate": 0.25,
        "repetition": None,
        "response_tokens": 30.0,
        "entropy": 0.2,
        "sampler_gap": 1e-7,
        "grad_norm": 0.1,
        "alarms": ("25% of responses are cut at the limit",),
        "artifacts": ("st-c",),
    }
    return DynamicsRow(**(fields | changes))


def cell(student: str, labels: int, base: float, value: float, outcome: Any) -> MapCell:
    return MapCell(
        student=student,
        labels=labels,
        base_rate=base,
        rule=0.5 + value,
        against=0.5,
        difference=value,
        interval=(value - 0.02, value + 0.02),
        p_value_corrected=0.4 if outcome == "ties" else 0.01,
        outcome=outcome,
    )


def stage(kind: str, users: tuple[str, ...], seconds: float) -> StageRow:
    return StageRow(
        fingerprint=f"{kind}-{'-'.join(users) or 'none'}",
        kind=kind,
        model="student",
        pool="labels",
        seed=0,
        used_by=users,
        seconds=seconds,
        spent={"seconds": seconds},
    )


def study(**changes: Any) -> Results:
    """The study; `changes` replace fields of the results."""
    nothing: dict[str, int | float] = {}
    fields: dict[str, Any] = {
        "name": "by-hand",
        "headwater": "0",
        "seeds": (0, 1),
        "machine": Machine(cpu="x", threads=1, torch="2", transformers="5"),
        "rows": (*map(row, ARMS), row("p0", evaluates="teacher", title="Half bridge: its teacher")),
        "differences": (
            difference("b2", "c", 0.10, "supported", match=("labels", "verifier_calls")),
            difference("c", "b0", 0.25, "supported"),
            difference("p1", "b2", -0.02, "undecided", not_worse_by=0.01),
            difference("o2", "b2", -0.04, "refuted"),
            difference("b2", "m1", 0.05, "undecided", match=("updates",)),
        ),
        "stages": (
            stage("grpo", ("b2", "o2", "h2"), 10.0),
            stage("grpo", ("c",), 5.0),
            stage("opd", ("b2",), 2.0),
            stage("evaluate", ("b2", "c"), 9.0),
        ),
        "ledger": LedgerTotals(physical=nothing, training=nothing, evaluation=nothing),
        "pools": {"labels": 256, "1H": 128, "2H": 128, "prompts": 700},
        "hypotheses": (
            HypothesisRow(
                name="H1", statement="It helps.", verdict="supported", eval_set="sums", claims=(0,)
            ),
            HypothesisRow(
                name="H2", statement="Both.", verdict="undecided", eval_set="sums", claims=(1, 2)
            ),
            HypothesisRow(
                name="H3", statement="OPD wins.", verdict="refuted", eval_set="sums", claims=(3,)
            ),
        ),
        "map": MapResult(
            rule="b2",
            against="c",
            eval_set="sums",
            cells=(
                cell("large", 16, 0.6, -0.06, "loses"),
                cell("small", 64, 0.2, 0.12, "wins"),
                cell("small", 16, 0.2, 0.01, "ties"),
            ),
        ),
        "routes": tuple(
            Route(
                arm=arm,
                base=base,
                teacher_base=teacher,
                taught_by=taught,
                transfers=transfers,
                others=others,
            )
            for arm, (_, _, base, teacher, taught, transfers, others) in ARMS.items()
        ),
        "gains": (
            GainRow(
                model="teacher",
                taught_by=("grpo(labels)",),
                eval_set="sums",
                before=0.3,
                after=0.8,
                difference=0.5,
                interval=(0.45, 0.55),
                arms=("t",),
            ),
        ),
        "probes": tuple(
            ProbeRow(
                arm=arm,
                after=after,
                overall=distance(kl),
                positions=(distance(kl), distance(kl / 2)),
                artifacts=(f"pr-{after}-{kl}",),
            )
            for arm in ("b2", "p1")
            for after, kl in (("start", 0.08), ("warmup", 0.03), ("opd", 0.004))
        ),
        "dynamics": (dynamics(), dynamics(pool="2H", used_by=("p1",), alarms=())),
    }
    return Results(**(fields | changes))
