"""Where GRPO would end, from a few of its steps: log-odds of the pass rate grow with the steps.

Pure and free of torch. The log-odds gained are taken to grow as a power below one of the steps:
later steps add less than the first. `docs/pilot.md` says where the power comes from, and how far
projections were off. Suffixes: Q problems, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwater.evals.base_rates import Share
from headwater.seeding import generator

_RESAMPLES = 2000
#: Log-odds gained grow as this power of the learning rate summed over steps.
_POWER = 0.55


@dataclass(frozen=True, slots=True)
class Trial:
    """Scores of one model on the same problems before and after a trial, means over attempts.

    stretch: what `stretch` says of the stage.
    """

    before_Q: np.ndarray
    after_Q: np.ndarray
    stretch: float


def stretch(trial_steps: int, steps: int, warmup_steps: int) -> float:
    """How many times the log-odds that a trial gains the whole stage is taken to gain.

    What counts is the learning rate summed over steps, for a linear warmup.

    >>> round(stretch(8, 24, 0), 2), round(stretch(8, 24, 3), 2), stretch(8, 8, 3)
    (1.83, 1.92, 1.0)
    """
    rates = _rate_sum(steps, warmup_steps) / _rate_sum(trial_steps, warmup_steps)
    return float(rates**_POWER)


def _rate_sum(steps: int, warmup_steps: int) -> float:
    return sum(min(1.0, (step + 1) / max(warmup_steps, 1)) for step in range(steps))


def gain(trial: Trial) -> Share:
    """What the trial added to the pass rate."""
    return _share(
        (trial.after_Q - trial.before_Q)[_draws(len(trial.before_Q))].mean(axis=1),
        float((trial.after_Q - trial.before_Q).mean()),
    )


def end(trial: Trial) -> Share:
    """The pass rate after the whole stage."""
    return _share(_ends_R(trial, _draws(len(trial.before_Q))), _end(trial))


def lead(teacher: Trial, student: Trial) -> Share:
    """The teacher's pass rate after its whole stage less the student's after its own.

    The interval is over problems, the same for both; it covers neither luck in training nor the
    error of the extrapolation.
    """
    draws_RQ = _draws(len(teacher.before_Q))
    leads_R = _ends_R(teacher, draws_RQ) - _ends_R(student, draws_RQ)
    return _share(leads_R, _end(teacher) - _end(student))


def _end(trial: Trial) -> float:
    everything = np.arange(len(trial.before_Q))[None]
    return float(_ends_R(trial, everything)[0])


def _ends_R(trial: Trial, draws_RQ: np.ndarray) -> np.ndarray:
    """Pass rates at the end, for every draw of problems; [R]."""
    problems = len(trial.before_Q)
    before_R = _log_odds(trial.before_Q[draws_RQ].mean(axis=1), problems)
    after_R = _log_odds(trial.after_Q[draws_RQ].mean(axis=1), problems)
    ends_R: np.ndarray = 1.0 / (1.0 + np.exp(-(before_R + trial.stretch * (after_R - before_R))))
    return ends_R


def _log_odds(rate_R: np.ndarray, problems: int) -> np.ndarray:
    """Log-odds, of half a problem more right and half a problem more wrong: always finite."""
    rate_R = (rate_R * problems + 0.5) / (problems + 1.0)
    found_R: np.ndarray = np.log(rate_R / (1.0 - rate_R))
    return found_R


def _draws(problems: int) -> np.ndarray:
    """Places of problems drawn with putting back, the same every time: int [R, Q]."""
    return generator(0, "pilot", "problems").integers(problems, size=(_RESAMPLES, problems))


def _share(values_R: np.ndarray, mean: float) -> Share:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return Share(mean, float(low), float(high))
