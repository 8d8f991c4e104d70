"""Which use of the labels a pilot advises, and why: a rule on what was measured.

Pure and free of torch. docs/pilot.md states the rule with the reasons of its thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headwater.evals.base_rates import BaseRates, Share

Verdict = Literal["fix_base", "cold_grpo", "bridge", "half_split", "too_close"]

#: Fewer groups with signal than this leave GRPO little to learn from: 1 in 10.
LEAST_SIGNAL = 0.1
#: With more attempts than this cut off, or without a readable answer, the pass rate misleads.
MOST_TRUNCATED, MOST_UNPARSEABLE = 0.3, 0.5
#: A lead smaller than this is none: what the extrapolation from a trial errs by.
LEAD = 0.05
#: What the bridge itself may add: a student ended up to so far above the teacher it learned from.
BRIDGE = 0.05
#: Labels from which half of them teach a teacher as well as all: 64 a half.
HALVES = 128


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rule looks at.

    lead: the teacher's pass rate at the end of its GRPO less the student's at the end of its own,
    as the trial projects; None without a trial. labels: of the recipe. has_halves: whether its
    labels are split.
    """

    teacher: BaseRates
    student: BaseRates
    lead: Share | None
    labels: int
    has_halves: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """A verdict, its reasons with the numbers they rest on, and what to look out for."""

    verdict: Verdict
    reasons: tuple[str, ...]
    cautions: tuple[str, ...] = ()


def advise(measured: Measured) -> Advice:
    """The rule: can the base be trained on, who has signal, who would end ahead and by how much."""
    return next(_verdicts(measured))


def _verdicts(measured: Measured) -> Iterator[Advice]:
    """The first that applies is the advice."""
    teacher, student = measured.teacher, measured.student
    broken = [*_unreadable("teacher", teacher), *_unreadable("student", student)]
    if broken:
        yield Advice("fix_base", tuple(broken))
    silent = {
        role: rates.signal.high < LEAST_SIGNAL and rates.pass_rate.mean < 0.5
        for role, rates in (("teacher", teacher), ("student", student))
    }
    if silent["teacher"] and silent["student"]:
        yield Advice(
            "fix_base",
            (
                f"groups with signal: teacher {_range(teacher.signal)}, student "
                f"{_range(student.signal)}; below {LEAST_SIGNAL:.0%} GRPO learns from neither. "
                "Take easier problems, sft on worked solutions under models.NAME.prepare, or a "
                "stronger base",
            ),
        )
    if silent["teacher"]:
        yield Advice("cold_grpo", (_no_signal("teacher", teacher),))
    if silent["student"]:
        yield _teacher_first(measured, _no_signal("student", student))
    yield _by_trial(measured, measured.lead) if measured.lead else _by_ceilings(measured)


def _unreadable(role: str, rates: BaseRates) -> Iterator[str]:
    if rates.truncation > MOST_TRUNCATED:
        yield (
            f"{rates.truncation:.0%} of the {role}'s attempts are cut off (more than "
            f"{MOST_TRUNCATED:.0%}): raise sampling.max_new_tokens, or take a base that answers "
            "sooner"
        )
    if rates.unparseable > MOST_UNPARSEABLE:
        yield (
            f"{rates.unparseable:.0%} of the {role}'s attempts hold no answer that the verifier "
            f"reads (more than {MOST_UNPARSEABLE:.0%}): change task.prompt, or teach the form with "
            "sft under models.NAME.prepare"
        )


def _no_signal(role: str, rates: BaseRates) -> str:
    return (
        f"groups of the {role} with signal: {_range(rates.signal)}, below {LEAST_SIGNAL:.0%}: GRPO "
        "on it has little to begin with, and the other model has"
    )


def _by_trial(measured: Measured, lead: Share) -> Advice:
    said = (
        f"projected from the trial, the teacher ends {100 * lead.mean:+.1f} points against the "
        f"student (95 % interval over problems {100 * lead.low:+.1f} to {100 * lead.high:+.1f})"
    )
    if lead.mean > LEAD and lead.low > 0.0:
        return _teacher_first(measured, f"{said}: more than {100 * LEAD:.0f} ahead")
    if lead.mean + BRIDGE < -LEAD and lead.high + BRIDGE < 0.0:
        return Advice(
            "cold_grpo",
            (
                f"{said}: further behind than the {100 * BRIDGE:.0f} points that a bridge may add, "
                f"by more than {100 * LEAD:.0f}. The bridge carries over what the teacher is, not "
                "what it gained",
            ),
        )
    return Advice(
        "too_close",
        (
            f"{said}: not told from a tie, where a bridge may add {100 * BRIDGE:.0f} points and "
            f"less than {100 * LEAD:.0f} count for nothing",
        ),
        ("cold GRPO is the cheaper of the two; both at several seeds decide",),
    )


def _by_ceilings(measured: Measured) -> Advice:
    """Without a trial: only where one model already passes what the other does in a whole group."""
    teacher, student = measured.teacher, measured.student
    if student.pass_rate.low > teacher.pass_at_k.high:
        return Advice(
            "cold_grpo",
            (
                f"the student's pass rate, {_range(student.pass_rate)}, is above what the teacher "
                f"does in a whole group of attempts, {_range(teacher.pass_at_k)}",
            ),
        )
    if teacher.pass_rate.low > student.pass_at_k.high:
        return _teacher_first(
            measured,
            f"the teacher's pass rate, {_range(teacher.pass_rate)}, is above what the student does "
            f"in a whole group of attempts, {_range(student.pass_at_k)}",
        )
    return Advice(
        "too_close",
        (
            "pass rates before training do not tell who learns faster: neither model passes what "
            "the other does in a whole group of attempts",
        ),
        ("run again with a trial: leave out --trial 0",),
    )


def _teacher_first(measured: Measured, reason: str) -> Advice:
    if measured.has_halves and measured.labels >= HALVES:
        half = (
            f"{measured.labels} labels: a half, {measured.labels // 2}, teaches the teacher about "
            "as well, and the rest is new to the student after the bridge (six seeds here: +2.6 "
            "points over the bridge alone, at twice its verifier calls; the paper: 0.8 the other "
            "way)"
        )
        return Advice("half_split", (reason, half))
    return Advice("bridge", (reason,))


def _range(share: Share) -> str:
    return f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"
