"""The verifier of the tortured runs: a user's function, so that it has processes to kill."""

from __future__ import annotations

import re
import time

_BOXED = re.compile(r"\\boxed\{(\d+)\}")


def grade(completion: str, gold: str) -> bool:
    """Whether the last boxed number is the gold answer; takes a moment, to be killed in."""
    time.sleep(0.0005)
    found = _BOXED.findall(completion)
    return bool(found) and found[-1] == gold
