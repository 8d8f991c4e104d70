"""Exact rational values of expressions, within limits on the size of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import reduce
from typing import Any

from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.tokens import TooLarge

MAX_BITS = 60_000
_MAX_FACTORIAL = 3000
CONSTANT_NAMES = frozenset({"e", "i", "pi"})


class Undefined(ValueError):
    """The expression has no value at this point (division by zero, a pole)."""


class NotRational(ValueError):
    """The expression is not built from rational numbers by rational operations."""


def symbols(tree: Expression) -> frozenset[str]:
    """Names of the free variables; the constants e, i and pi are none."""
    if isinstance(tree, Symbol):
        return frozenset() if tree.name in CONSTANT_NAMES else frozenset({tree.name})
    if isinstance(tree, Operation):
        return frozenset().union(*map(symbols, tree.operands))
    return frozenset()


def mentions(tree: Expression, name: str) -> bool:
    """Whether a symbol of that name occurs in the expression."""
    if isinstance(tree, Operation):
        return any(mentions(operand, name) for operand in tree.operands)
    return isinstance(tree, Symbol) and tree.name == name


def applies(tree: Expression, operators: frozenset[str]) -> bool:
    """Whether one of the operators occurs in the expression."""
    if not isinstance(tree, Operation):
        return False
    return tree.operator in operators or any(applies(part, operators) for part in tree.operands)


def numbers(tree: Expression) -> frozenset[Fraction]:
    """The numbers that are written in the expression."""
    if isinstance(tree, Operation):
        return frozenset().union(*map(numbers, tree.operands))
    return frozenset({tree.value}) if isinstance(tree, Number) else frozenset()


def substitute(tree: Expression, point: Mapping[str, Fraction]) -> Expression:
    """The expression with numbers in place of variables."""
    if isinstance(tree, Symbol):
        return Number(point[tree.name]) if tree.name in point else tree
    if isinstance(tree, Operation):
        operands = tuple(substitute(operand, point) for operand in tree.operands)
        return Operation(tree.operator, operands)
    return tree


def rational(tree: Expression, point: Mapping[str, Fraction] | None = None) -> Fraction:
    """The exact value; raise NotRational, Undefined or TooLarge (numbers beyond MAX_BITS)."""
    if isinstance(tree, Number):
        return tree.value
    if isinstance(tree, Symbol):
        if point is None or tree.name not in point:
            raise NotRational(tree.name)
        return point[tree.name]
    if tree.operator not in _RATIONAL:
        raise NotRational(tree.operator)
    operands = [rational(operand, point) for operand in tree.operands]
    value: Fraction = _RATIONAL[tree.operator](*operands)
    return _bounded(value)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge("number too large")
    return value


def _inverse(value: Fraction) -> Fraction:
    if not value:
        raise Undefined("division by zero")
    return 1 / value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise NotRational("^")
    if not base and exponent <= 0:
        raise Undefined("a power of zero")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and size * abs(exponent) > MAX_BITS:
        raise TooLarge("power too large")
    return base ** (exponent.numerator % 2 if base == -1 else exponent.numerator)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise NotRational("!")
    if value > _MAX_FACTORIAL:
        raise TooLarge("factorial too large")
    return Fraction(math.factorial(value.numerator))


def _binomial(over: Fraction, under: Fraction) -> Fraction:
    if over.denominator != 1 or under.denominator != 1 or over < 0 or under < 0:
        raise NotRational("binom")
    if over > 5 * _MAX_FACTORIAL and min(under, over - under) > _MAX_FACTORIAL:
        raise TooLarge("binomial too large")
    return Fraction(math.comb(over.numerator, under.numerator))


def _root(value: Fraction, index: Fraction = Fraction(2)) -> Fraction:
    """An exact rational root where there is one."""
    if index.denominator != 1 or not 1 <= index <= 64 or value < 0:
        raise NotRational("root")
    parts = []
    for part in (value.numerator, value.denominator):
        root = _integer_root(part, index.numerator)
        if root**index.numerator != part:
            raise NotRational("root")
        parts.append(root)
    return Fraction(*parts)


def _integer_root(value: int, index: int) -> int:
    if index == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // index + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**index <= value else (low, middle - 1)
    return low


def _sum(*values: Fraction) -> Fraction:
    return reduce(lambda total, value: _bounded(total + value), values)


def _product(*values: Fraction) -> Fraction:
    return reduce(lambda total, value: _bounded(total * value), values)


_RATIONAL: dict[str, Any] = {
    "+": _sum, "*": _product, "neg": lambda value: -value, "inv": _inverse, "^": _power,
    "!": _factorial, "binom": _binomial, "sqrt": _root, "root": _root, "abs": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
}  # fmt: skip
