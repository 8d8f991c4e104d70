"""What can be spent, and a total of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from headwater.errors import InputError

INTEGER_COUNTERS = (
    "verifier_calls",
    "prompts",
    "generated_tokens",
    "teacher_scored_tokens",
    "trained_tokens",
    "updates",
)
REAL_COUNTERS = ("flops", "seconds")
COUNTERS = INTEGER_COUNTERS + REAL_COUNTERS
LIMITABLE = ("labels", *COUNTERS)


@dataclass(frozen=True, slots=True)
class Spending:
    """A total over some stages.

    labels: distinct problems whose gold answer was read; peak_memory_bytes: the largest
    observed; everything else is a sum. flops are floating-point operations, seconds wall time.
    """

    labels: int = 0
    verifier_calls: int = 0
    prompts: int = 0
    generated_tokens: int = 0
    teacher_scored_tokens: int = 0
    trained_tokens: int = 0
    updates: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def as_dict(self) -> dict[str, int | float]:
        """Field name -> value, in the order of the fields.

        >>> Spending(labels=2, updates=1).as_dict()["labels"]
        2
        """
        return asdict(self)


class SpendingAccount(Protocol):
    """What a stage needs of its account; `ledger.Account` is one, and says what each does."""

    def read_labels(self, problem_ids: Sequence[str], verifier_calls_each: int = 1) -> int:
        """Charge the reading of gold answers; returns how many ids were paid for."""
        ...

    def charge(self, **amounts: float) -> None:
        """Charge work that was done. Raises BudgetExhausted."""
        ...

    def remaining(self, counter: str) -> float:
        """What the budget still allows of a counter."""
        ...

    def observe_peak_memory(self, bytes_: int) -> None:
        """Keep the largest memory use seen, in bytes."""
        ...

    def position(self) -> int:
        """Number of live entries."""
        ...

    def rewind(self, position: int) -> None:
        """Entries after `position` count no longer."""
        ...


def checked_amount(name: str, amount: float) -> float:
    """An amount that may be charged: whole, but for flops and seconds.

    Raises InputError for a counter that does not exist or is charged otherwise, and for a negative
    or fractional amount.
    """
    if name == "verifier_calls":
        raise InputError("verifier_calls are charged by read_labels, with the labels they read")
    if name not in COUNTERS:
        raise InputError(f"counter {name!r} does not exist; use one of {', '.join(COUNTERS)}")
    if not (math.isfinite(amount) and amount >= 0):
        raise InputError(f"{name}={amount}; expected a finite amount of 0 or more")
    if name in REAL_COUNTERS:
        return float(amount)
    if amount != int(amount):
        raise InputError(f"{name}={amount}; expected a whole number")
    return int(amount)
