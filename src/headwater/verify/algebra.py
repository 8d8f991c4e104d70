r"""Algebra for comparisons that exact arithmetic leaves open; runs in killable workers only.

sympy proves or refutes equality of expressions that agree numerically; Math-Verify reads the
answers that `answers.read_answer` cannot. Both may hang or use much memory: the worker's limits,
not timers in here, end that.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from headwater.verify import values
from headwater.verify.equivalence import Finding, compare
from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.notation import normalise
from headwater.verify.splitting import split_at

_DIGITS = 400
_BEYOND_EXPRESSIONS = re.compile(r"\\(?:int|sum|prod|lim|begin|setminus|cap|cup|mathbb|det)\b")
_COMMAND = re.compile(r"\\((?:begin|end) ?\{[a-zA-Z]*\}|[a-zA-Z]+|.)", re.DOTALL)
_COMMANDS = frozenset(
    {
        "frac", "sqrt", "binom", "int", "sum", "prod", "lim", "infty", "pi", "cdot", "times", "div",
        "le", "ge", "ne", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan",
        "ln", "log", "exp", "cup", "cap", "setminus", "mathbb", "det", "to", "alpha", "beta",
        "theta", "phi", "lambda", "\\", "{", "}",
    }
    | {f"{edge}{{{kind}matrix}}" for edge in ("begin", "end") for kind in ("", "p", "b", "v")}
)  # fmt: skip
_ADMITTED = re.compile(r"(?!.*(?:[A-Za-z]{3}|\.\.))[0-9A-Za-z+\-*/^_(){}\[\],.|=&<>! ]*")
_EQUALS = re.compile("=")

logging.disable(logging.CRITICAL)


def settle(answer: str, gold: str) -> str:
    """Return "verdict:how" for an extracted answer and a gold answer."""
    finding: Finding = compare(
        answer, gold, prove=prove, judge_opaque=lambda: judge_with_math_verify(answer, gold)
    )
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


def judge_with_math_verify(answer: str, gold: str) -> bool | None:
    """Math-Verify's word on calculus, matrices and set operations; None on anything else.

    It forgives much (words, dots, half-open brackets), so it only sees texts made of
    mathematics it is known to read.
    """
    texts = [normalise(text) for text in (answer, gold)]
    if not any(_BEYOND_EXPRESSIONS.search(text) for text in texts):
        return None
    if not all(map(_is_admitted, texts)):
        return None
    config = [LatexExtractionConfig()]
    read = [parse(f"${text}$", config, parsing_timeout=None) for text in texts]
    if not all(read) or any(isinstance(side[0], str) for side in read):
        return None
    return bool(verify(read[1], read[0], strict=True, timeout_seconds=None))


def _is_admitted(text: str) -> bool:
    if len(split_at(text, _EQUALS)) > 1:
        return False
    return _ADMITTED.fullmatch(_COMMAND.sub(_admitted_command, text)) is not None


def _admitted_command(command: re.Match[str]) -> str:
    return " " if command.group(1) in _COMMANDS else "?"


def to_sympy(tree: Expression) -> Any:
    """The same expression in sympy."""
    if isinstance(tree, Number):
        return sympy.Rational(tree.value.numerator, tree.value.denominator)
    if isinstance(tree, Symbol):
        constants = {"e": sympy.E, "i": sympy.I, "pi": sympy.pi}
        return constants.get(tree.name) or sympy.Symbol(tree.name, real=True)
    assert isinstance(tree, Operation)
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
