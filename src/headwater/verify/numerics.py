"""Values of expressions to many digits, at fixed points for their variables."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]

from headwater.verify.arithmetic import (
    MAX_BITS,
    NotRational,
    Undefined,
    applies,
    mentions,
    numbers,
    rational,
    symbols,
)
from headwater.verify.expression import Expression, Number, Symbol
from headwater.verify.tokens import TooLarge

_MP = mpmath.MPContext()
_MP_LOCK = threading.Lock()
_POINTS = 6
_ROUNDING = 0.02
_NOT_REAL = 1e-12
_LARGEST_ARGUMENT = 20_000
_AXES = (
    Fraction(1_299_709, 524_287), Fraction(-611_953, 262_139), Fraction(86_028_157, 131_071),
    Fraction(-15_485_863, 65_537), Fraction(104_729, 1_048_573), Fraction(-224_737, 2_097_143),
)  # fmt: skip
_STEP = Fraction(982_451, 174_763)
_IN_PIECES = frozenset({"abs", "floor", "ceil"})
_PLACES = (
    *(Fraction(sign * size) for size in range(1, 7) for sign in (1, -1)),
    *(Fraction(sign * (7 * size + 2), 14) for size in range(12) for sign in (1, -1)),
    *(Fraction(sign * size, 3) for size in (101, 1001, 20_011) for sign in (1, -1)),
)
_BESIDE = (Fraction(-1, 7), Fraction(1, 7))
_MOST_TURNS = 12


def points_for(*trees: Expression) -> list[dict[str, Fraction]]:
    """Fixed points of both signs for the variables of all trees; one is enough for a constant.

    What changes its formula along the way (absolute values, floors) gets many more: whole numbers,
    near and far ones, and some on both sides of every number that is in the trees.
    """
    names = sorted(frozenset().union(*map(symbols, trees)))
    if not names:
        return [{}]
    chosen = _points(names)
    if any(applies(tree, _IN_PIECES) for tree in trees):
        turns = sorted(frozenset().union(*map(numbers, trees)))[:_MOST_TURNS]
        beside = (sign * turn + step for turn in turns for sign in (1, -1) for step in _BESIDE)
        places = (*_PLACES, *beside)
        for row in range(len(places)):
            shifted = (places[(row + 7 * column) % len(places)] for column in range(len(names)))
            chosen.append(dict(zip(names, shifted, strict=True)))
    return chosen


def _points(names: list[str]) -> list[dict[str, Fraction]]:
    chosen = []
    for row in range(_POINTS):
        point = {}
        for column, name in enumerate(names):
            axis = _AXES[(row + column * (row + 1)) % len(_AXES)]
            point[name] = axis + _STEP * Fraction(column * (row + 2), 7)
        chosen.append(point)
    return chosen


def evaluate(tree: Expression, point: Mapping[str, Fraction], digits: int) -> Any:
    """A complex number with about `digits` digits; raise Undefined or TooLarge."""
    with _MP_LOCK, _MP.workdps(digits + 15):
        value = _number(tree, point)
        if not _MP.isfinite(value):
            raise Undefined("not finite")
        return _MP.mpc(value)


def _number(tree: Expression, point: Mapping[str, Fraction]) -> Any:
    if isinstance(tree, Number):
        return _MP.mpf(tree.value.numerator) / tree.value.denominator
    if isinstance(tree, Symbol):
        if tree.name in point:
            chosen = point[tree.name]
            return _MP.mpf(chosen.numerator) / chosen.denominator
        return {"e": _MP.e, "i": _MP.j, "pi": _MP.pi}[tree.name] * 1
    operands = [_number(operand, point) for operand in tree.operands]
    try:
        if tree.operator == "^" and _negative(operands[0]):
            value = _power_of_negative(operands, tree.operands[1])
        else:
            value = _apply(tree.operator, operands)
    except (ZeroDivisionError, ValueError, OverflowError) as error:
        raise Undefined(tree.operator) from error
    if _MP.isfinite(value) and value and abs(_MP.mag(abs(value))) > MAX_BITS:
        raise TooLarge("number too large")
    return value


def _negative(value: Any) -> bool:
    return bool(_MP.im(value) == 0 and _MP.re(value) < 0)


def _power_of_negative(operands: list[Any], exponent: Expression) -> Any:
    """The real one where there is a real root, as in (-8)^(1/3) = -2."""
    try:
        fraction = rational(exponent)
    except (NotRational, Undefined):
        fraction = Fraction(0)
    if fraction.denominator == 1 or fraction.denominator % 2 == 0:
        return _apply("^", operands)
    size = _apply("^", [-operands[0], operands[1]])
    return -size if fraction.numerator % 2 else size


def _apply(operator: str, operands: list[Any]) -> Any:
    first = operands[0]
    if operator == "+":
        return _MP.fsum(operands)
    if operator == "*":
        return _MP.fprod(operands)
    if operator == "^":
        exponent = operands[1]
        if first and abs(exponent) * (abs(_MP.mag(first)) + 1) > 4 * MAX_BITS:
            raise TooLarge("power too large")
        if not first and _MP.re(exponent) <= 0:
            raise Undefined("a power of zero")
        return _MP.power(first, exponent)
    if (
        operator in ("!", "exp", "binom", "sinh", "cosh")
        and max(map(abs, operands)) > _LARGEST_ARGUMENT
    ):
        raise TooLarge("argument too large")
    if operator == "apply":  # an unknown function: neither linear, even, odd nor a power
        name, argument = operands
        return _MP.sin(name * argument + 1) + argument**3 / (2 + name**2)
    if operator == "log":
        return _MP.log(first, operands[1] if len(operands) > 1 else 10)
    if operator == "root":
        index = operands[1]
        if _negative(first) and index == int(_MP.re(index)) and index % 2:
            return -_MP.power(-first, 1 / index)
        return _MP.power(first, 1 / index)
    return _NUMERIC[operator](*operands)


_NUMERIC: dict[str, Any] = {
    "neg": lambda value: -value, "inv": lambda value: 1 / value, "!": _MP.factorial,
    "binom": _MP.binomial, "sqrt": _MP.sqrt, "abs": abs, "floor": _MP.floor,
    "ceil": _MP.ceil, "exp": _MP.exp, "ln": _MP.log,
    "sin": _MP.sin, "cos": _MP.cos, "tan": _MP.tan, "cot": _MP.cot,
    "sec": _MP.sec, "csc": _MP.csc, "arcsin": _MP.asin, "arccos": _MP.acos,
    "arctan": _MP.atan, "sinh": _MP.sinh, "cosh": _MP.cosh, "tanh": _MP.tanh,
}  # fmt: skip


def outside_domain(left: Expression, right: Expression, values: list[Any]) -> bool:
    """Whether both sides are real functions that have no real value where `values` were taken."""
    if mentions(left, "i") or mentions(right, "i"):
        return False
    return all(abs(value.imag) > _NOT_REAL * max(abs(value), 1) for value in values)


def roughly_equal(one: Expression, other: Expression) -> bool:
    """Whether two constants are within two percent of each other, as a value and its rounding."""
    try:
        first, second = evaluate(one, {}, 15), evaluate(other, {}, 15)
    except (Undefined, KeyError):
        return False
    return bool(abs(first - second) <= _ROUNDING * max(abs(first), abs(second)))


def threshold(base: int, exponent: int) -> Any:
    """A threshold such as 10^-50, which a float could not hold."""
    return _MP.mpf(base) ** exponent
