r"""Algebra for comparisons that exact arithmetic leaves open; runs in killable workers only.

sympy proves or refutes equality of expressions that agree numerically; Math-Verify reads the
answers that `answers.read_answer` cannot. Both may hang or use much memory: the worker's limits,
not timers in here, end that.
"""

from __future__ import annotations

import logging
from typing import Any

import sympy
import sympy.core.random
from math_verify import LatexExtractionConfig, parse, verify

from headwater.verify import values
from headwater.verify.equivalence import Finding, compare
from headwater.verify.expression import Expression, Number, Operation, Symbol

_DIGITS = 400

logging.disable(logging.CRITICAL)


def settle(answer: str, gold: str) -> str:
    """Return "verdict:how" for an extracted answer and a gold answer.

    sympy's random points are the same for every case, whichever came before it.
    """
    sympy.core.random.seed(0)
    finding: Finding = compare(answer, gold, prove=prove, judge_opaque=judge_with_math_verify)
    return f"{finding.verdict.value}:{finding.how}"


def prove(one: Expression, other: Expression) -> bool | None:
    """Whether two expressions are equal, by arithmetic, then sympy, then very many digits."""
    equal = values.equal(one, other)
    if equal is not None:
        return equal
    difference = to_sympy(one) - to_sympy(other)
    if sympy.simplify(difference) == 0:
        return True
    return values.agree(one, other, _DIGITS, smallest=0)


def judge_with_math_verify(answer: str, gold: str) -> bool:
    """Math-Verify's word on mathematics, in common notation, that `opaque` admits."""
    config = [LatexExtractionConfig()]
    read = [parse(f"${text}$", config, parsing_timeout=None) for text in (answer, gold)]
    if not all(read) or any(isinstance(side[0], str) for side in read):
        return False
    return bool(verify(read[1], read[0], strict=True, timeout_seconds=None))


def to_sympy(tree: Expression) -> Any:
    """The same expression in sympy."""
    if isinstance(tree, Number):
        return sympy.Rational(tree.value.numerator, tree.value.denominator)
    if isinstance(tree, Symbol):
        constants = {"e": sympy.E, "i": sympy.I, "pi": sympy.pi}
        return constants.get(tree.name) or sympy.Symbol(tree.name, real=True)
    assert isinstance(tree, Operation)
    if tree.operator == "apply":
        name, argument = tree.operands
        assert isinstance(name, Symbol)
        return sympy.Function(name.name)(to_sympy(argument))
    return _SYMPY[tree.operator](*map(to_sympy, tree.operands))


_SYMPY: dict[str, Any] = {
    "+": sympy.Add, "*": sympy.Mul, "^": sympy.Pow, "neg": lambda value: -value,
    "inv": lambda value: 1 / value, "!": sympy.factorial, "binom": sympy.binomial,
    "sqrt": sympy.sqrt, "root": sympy.root, "abs": sympy.Abs, "floor": sympy.floor,
    "ceil": sympy.ceiling, "exp": sympy.exp, "ln": sympy.log,
    "log": lambda value, base=10: sympy.log(value, base), "sin": sympy.sin, "cos": sympy.cos,
    "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc, "arcsin": sympy.asin,
    "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
    "tanh": sympy.tanh,
}  # fmt: skip

#: What loads the parts of sympy that most cases need. Workers are forked from the process that
#: imported this module, so that one started after a kill is as quick as the one before it.
_USUAL = (
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\int_0^1 x dx", "1"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
)

for _answer, _gold in _USUAL:
    settle(_answer, _gold)
