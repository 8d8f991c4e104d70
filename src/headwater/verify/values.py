r"""Are two expressions equal? Exactly, within bounded work, and None where only algebra can say.

Rational numbers are computed. Otherwise both sides are evaluated to many digits at fixed points:
any difference settles it. Where they agree and only roots are involved, a separation bound makes
the agreement a proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from headwater.verify.arithmetic import NotRational, Undefined, rational, substitute
from headwater.verify.expression import Expression, Operation
from headwater.verify.numerics import evaluate, outside_domain, points_for, threshold
from headwater.verify.separation import prove_equal
from headwater.verify.tokens import TooLarge

_PROBE_DIGITS = 50
_MOST_PROBE_DIGITS = 400
_CLEARLY_APART = 1e-12


def equal(left: Expression, right: Expression) -> bool | None:
    """Whether two expressions are the same number or function; None if algebra must say.

    Raises TooLarge for numbers too large to compute.
    """
    try:
        return rational(left) == rational(right)
    except (NotRational, Undefined):
        pass
    agreed = agree(left, right, _PROBE_DIGITS)
    if not agreed:
        return agreed
    return prove_equal(left, right)


def agree(left: Expression, right: Expression, digits: int, *, smallest: int = 1) -> bool | None:
    """Whether both sides have the same value to `digits` digits wherever one has a value.

    Digits are relative to the larger side, or to `smallest` where both are below it. Functions
    that do not mention i are compared where one is real, if there is such a point. None where
    neither side has a value at any point.
    """
    tried = points_for(left, right)
    for everywhere in (False, True):
        compared = 0
        for point in tried:
            same = _agree_at(left, right, point, digits, smallest, everywhere or not point)
            if same is False:
                return False
            compared += same is True
        if compared:
            return True
    return None


def _agree_at(
    left: Expression,
    right: Expression,
    point: Mapping[str, Fraction],
    digits: int,
    smallest: int,
    everywhere: bool,
) -> bool | None:
    values: list[Any] = []
    for side in (left, right):
        try:
            values.append(evaluate(side, point, digits))
        except Undefined:
            values.append(None)
        except TooLarge:
            if not point:
                raise
            return None  # other points are nearer
    if None in values:
        return None if values == [None, None] else False
    if not everywhere and outside_domain(left, right, values):
        return None
    one, other = values
    size = max(abs(one), abs(other), smallest)
    apart = abs(one - other) / size if size else size
    if apart <= threshold(10, 2 - digits):
        return True
    if apart > _CLEARLY_APART or digits >= _MOST_PROBE_DIGITS:
        return False
    return _agree_at(left, right, point, 8 * digits, smallest, everywhere)


def proportional(left: Expression, right: Expression) -> tuple[bool | None, int]:
    """Whether left = c * right for a constant c that is not zero, and the sign of c.

    The sign is 0 where c is not real or not known.
    """
    for point in points_for(left, right):
        try:
            over, under = (evaluate(side, point, _PROBE_DIGITS) for side in (left, right))
        except Undefined:
            continue
        if min(abs(over), abs(under)) < _CLEARLY_APART:
            continue
        there = [substitute(side, point) for side in (left, right)]
        same = equal(
            Operation("*", (left, there[1])),
            Operation("*", (right, there[0])),
        )
        ratio = over / under
        return same, (1 if ratio.real > 0 else -1) if abs(ratio.imag) < _CLEARLY_APART else 0
    return None, 0
