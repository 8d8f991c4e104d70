r"""When is agreement to many digits a proof? For expressions of roots, by a separation bound.

Burnikel, Funke, Mehlhorn, Schirra and Schmitt (ESA 2001): written as U/L with U and L algebraic
integers, an expression of rational operations and roots that is not zero is at least
1 / (u^(D-1) l) in size, where u and l bound U and L with all their conjugates and D bounds the
degree of the field. Variables take fixed rational values, and pi is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from headwater.verify.arithmetic import NotRational, Undefined, rational
from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.numerics import evaluate, outside_domain, points_for, threshold

_FREE_PI = "pi as a variable"
_GUARD_BITS = 40
_MAX_PROOF_BITS = 20_000
_DIGITS_PER_BIT = 0.302


class _NoBound(ValueError):
    """The expression is not one of roots and rational operations."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """log2 of u and l of the separation bound, never negative."""

    over: float
    under: float


def prove_equal(left: Expression, right: Expression) -> bool | None:
    """Whether both sides are equal at the fixed points, by the separation bound; None without one.

    Points where neither side is real say nothing about real functions. With pi in place of a
    variable equality is proved, but not refuted.
    """
    left, right = sides = _with_free_pi(left), _with_free_pi(right)
    difference = Operation("+", (left, Operation("neg", (right,))))
    compared = 0
    for point in points_for(difference):
        point = {name: abs(x) if name == _FREE_PI else x for name, x in point.items()}
        try:
            if point and outside_domain(left, right, [evaluate(s, point, 15) for s in sides]):
                continue
            is_zero = _is_zero(difference, point)
        except Undefined:
            continue
        except _NoBound:
            return None
        if not is_zero:
            return None if _FREE_PI in point else False
        compared += 1
    return True if compared else None


def _is_zero(tree: Expression, point: Mapping[str, Fraction]) -> bool:
    radicals: dict[Expression, int] = {}
    bound = _bound(tree, point, radicals)
    degree = math.prod(radicals.values())
    if degree > _MAX_PROOF_BITS:
        raise _NoBound("degree")
    bits = bound.over * (degree - 1) + bound.under + _GUARD_BITS
    if bits > _MAX_PROOF_BITS:
        raise _NoBound("bits")
    digits = int(_DIGITS_PER_BIT * (bits + bound.over + bound.under)) + 5
    value = evaluate(tree, point, digits)
    return bool(abs(value) <= threshold(2, _GUARD_BITS // 2 - int(bits)))


def _with_free_pi(tree: Expression) -> Expression:
    """pi is transcendental: an identity of roots holds for it only if it holds for a variable."""
    if isinstance(tree, Symbol):
        return Symbol(_FREE_PI) if tree.name == "pi" else tree
    if isinstance(tree, Operation):
        return Operation(tree.operator, tuple(map(_with_free_pi, tree.operands)))
    return tree


def _bound(
    tree: Expression, point: Mapping[str, Fraction], radicals: dict[Expression, int]
) -> _Bound:
    if isinstance(tree, Number):
        return _bound_of(tree.value)
    if isinstance(tree, Symbol):
        if tree.name == "i":
            radicals[tree] = 2
            return _Bound(0.0, 0.0)
        if tree.name not in point:
            raise _NoBound(tree.name)
        return _bound_of(point[tree.name])
    if tree.operator == "^":
        base, exponent = tree.operands
        return _bound_of_power(tree, base, _exponent(exponent), point, radicals)
    if tree.operator in ("sqrt", "root"):
        index = Fraction(2) if tree.operator == "sqrt" else _exponent(tree.operands[1])
        return _bound_of_power(tree, tree.operands[0], 1 / index, point, radicals)
    if tree.operator not in ("+", "*", "neg", "inv"):
        return _bound_of_value(tree, point)
    parts = [_bound(operand, point, radicals) for operand in tree.operands]
    if tree.operator == "inv":
        return _Bound(parts[0].under, parts[0].over)
    if tree.operator == "*":
        return _Bound(sum(part.over for part in parts), sum(part.under for part in parts))
    under = sum(part.under for part in parts)
    over = max(part.over + under - part.under for part in parts) + math.log2(len(parts))
    return _Bound(over, under)


def _bound_of(value: Fraction) -> _Bound:
    return _Bound(
        float(max(abs(value.numerator), 1).bit_length()), float(value.denominator.bit_length())
    )


def _bound_of_value(tree: Expression, point: Mapping[str, Fraction]) -> _Bound:
    try:
        return _bound_of(rational(tree, point))
    except NotRational as error:
        raise _NoBound(str(error)) from None


def _exponent(tree: Expression) -> Fraction:
    try:
        value = rational(tree)
    except NotRational:
        raise _NoBound("^") from None
    if abs(value) > 500 or value.denominator > 64:
        raise _NoBound("^")
    return value


def _bound_of_power(
    tree: Expression,
    base: Expression,
    exponent: Fraction,
    point: Mapping[str, Fraction],
    radicals: dict[Expression, int],
) -> _Bound:
    """u and l of base^(p/q): the q-th root of U L^(q-1), over L; then a power, maybe inverted."""
    inner = _bound(base, point, radicals)
    power, index = abs(exponent.numerator), exponent.denominator
    if index > 1:
        radicals[Operation("root", (base, Number(Fraction(index))))] = index
        inner = _Bound((inner.over + (index - 1) * inner.under) / index, inner.under)
    result = _Bound(inner.over * power, inner.under * power)
    return _Bound(result.under, result.over) if exponent < 0 else result
