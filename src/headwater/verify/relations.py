r"""Equations, inequalities and membership: values under a name, sets of values, relations."""

from __future__ import annotations

import re
from collections.abc import Callable

from headwater.verify.expression import Number, Operation, Symbol, read_expression
from headwater.verify.kinds import Answer, Bracketed, Labelled, Opaque, Relation, Scalar, Union
from headwater.verify.splitting import is_label, is_single_name, label_key, split_at
from headwater.verify.tokens import Unreadable

_RELATIONS = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|=<|=>|!=|:=|==|<|>|=)")
_RELATION_NAMES = {
    "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "=<": "<=", "=>": ">=", ":=": "=", "==": "=",
}  # fmt: skip
_MEMBER = re.compile(r"\\in(?![a-z])")
_BARS = re.compile(r"\|.*\|")
FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def interval(low: Scalar | None, opening: str, high: Scalar | None, closing: str) -> Bracketed:
    """The interval between two ends; an end that is None is infinite, and open."""
    infinity = Scalar(Symbol("infty"))
    ends = (low or _negated(infinity), high or infinity)
    return Bracketed(ends, ("(" if low is None else opening) + (")" if high is None else closing))


def read_member(text: str, read: Callable[[str], Answer]) -> Answer | None:
    r"""`x \in [1, 2]` is the set under the name x."""
    sides = split_at(text, _MEMBER)
    if len(sides) != 2 or not is_label(sides[0]):
        return None
    return Labelled(label_key(sides[0]), read(sides[1]), None)


def read_relation(text: str, read: Callable[[str], Answer]) -> Answer | None:
    """x = 5 as a value under a name, x > 5 as an interval under a name, others as relations.

    Chains such as 2 + 3 = 5 are relations and stand for no value.
    """
    operators: list[str] = []
    sides = split_at(text, _RELATIONS, operators)
    if len(sides) < 2:
        return None
    names = tuple(_RELATION_NAMES.get(name, name) for name in operators)
    if names == ("=",):
        if not sides[0]:
            return read(sides[1])
        for label, value in (sides, sides[::-1]):
            if is_label(label) and not (label is sides[1] and not is_single_name(label)):
                return Labelled(label_key(label), read(value), _relation(sides, names))
    if any(not side.strip() for side in sides):
        return Opaque(text)
    return _as_interval(sides, names) or _relation(sides, names) or Opaque(text)


def _relation(sides: list[str], operators: tuple[str, ...]) -> Relation | None:
    try:
        return Relation(tuple(read_expression(side) for side in sides), operators)
    except Unreadable:
        return None


def _as_interval(sides: list[str], operators: tuple[str, ...]) -> Answer | None:
    """The set of values an inequality leaves to a name, as an interval or a union."""
    if any(operator.startswith(">") for operator in operators):
        if not all(operator.startswith(">") for operator in operators):
            return None
        sides, operators = sides[::-1], tuple(FLIPPED[name] for name in operators[::-1])
    relation = _relation(sides, operators)
    try:
        if operators == ("!=",) and is_label(sides[0]):
            hole = Scalar(read_expression(sides[1]))
            apart = Union((interval(None, "(", hole, ")"), interval(hole, "(", None, ")")))
            return Labelled(label_key(sides[0]), apart, relation)
        if not all(operator in ("<", "<=") for operator in operators):
            return None
        if len(sides) == 3 and is_label(sides[1]):
            low, high = Scalar(read_expression(sides[0])), Scalar(read_expression(sides[2]))
            label, values = sides[1], _around(sides[1], low, operators[0], high, operators[1])
        elif len(sides) == 2 and is_label(sides[0]):
            high = Scalar(read_expression(sides[1]))
            label, values = sides[0], _around(sides[0], None, "<", high, operators[0])
        elif len(sides) == 2 and is_label(sides[1]):
            low = Scalar(read_expression(sides[0]))
            label, values = sides[1], _around(sides[1], low, operators[0], None, "<")
        else:
            return None
    except Unreadable:
        return None
    return values and Labelled(label_key(label).strip("|"), values, relation)


def _around(
    label: str, low: Scalar | None, low_operator: str, high: Scalar | None, high_operator: str
) -> Answer | None:
    opening = "(" if low_operator == "<" else "["
    closing = ")" if high_operator == "<" else "]"
    if not _BARS.fullmatch(label.strip()):
        return interval(low, opening, high, closing)
    if low is None and high is not None:
        return interval(_negated(high), {")": "(", "]": "["}[closing], high, closing)
    if low is None:
        return None
    mirrored = "]" if opening == "[" else ")"
    left_opening = "[" if closing == "]" else "("
    left = interval(_negated(high) if high else None, left_opening, _negated(low), mirrored)
    return Union((left, interval(low, opening, high, closing)))


def _negated(value: Scalar) -> Scalar:
    if isinstance(value.tree, Number):
        return Scalar(Number(-value.tree.value))
    return Scalar(Operation("neg", (value.tree,)))
