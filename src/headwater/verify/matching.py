"""Do two answers say the same? By their kinds, down to the expressions they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations

from headwater.verify import values
from headwater.verify.answers import label_free
from headwater.verify.arithmetic import symbols
from headwater.verify.expression import Expression, Number, Operation, Symbol
from headwater.verify.kinds import (
    Answer,
    Based,
    Bracketed,
    Choice,
    Clock,
    Labelled,
    Listing,
    Matrix,
    Opaque,
    Ratio,
    Relation,
    Scalar,
    Text,
    Union,
)
from headwater.verify.relations import FLIPPED
from headwater.verify.units import PERCENT, compatible
from headwater.verify.words import same_time, text_key

_FUNCTION = re.compile(r"([A-Za-z])\(([A-Za-z])\)")
_EMPTY = Scalar(Symbol("emptyset"))
_ZERO = Number(Fraction(0))
_PERCENT = Number(Fraction(1, 100))

Prover = Callable[[Expression, Expression], bool | None]


@dataclass(slots=True)
class Matching:
    """One comparison of two answers; True, False, or None where it is not known."""

    prove: Prover
    met_opaque: bool = field(default=False)

    def answers(self, one: Answer, other: Answer) -> bool | None:
        if isinstance(one, Choice) or isinstance(other, Choice):
            return self.choices(one, other)
        if isinstance(one, Labelled) or isinstance(other, Labelled):
            return self.labelled(one, other)
        if isinstance(one, Opaque) or isinstance(other, Opaque):
            self.met_opaque |= not isinstance(one, Text) and not isinstance(other, Text)
            return None if self.met_opaque else False
        match one, other:
            case Scalar(), Scalar():
                return self.scalars(one, other)
            case Listing(), Listing():
                return self.listings(one, other)
            case (Listing(), Bracketed()) | (Bracketed(), Listing()):
                return self.assignments(one, other)
            case Bracketed(), Bracketed():
                return one.brackets == other.brackets and self.in_order(one.items, other.items)
            case Union(), Union():
                return self.in_any_order(one.parts, other.parts)
            case Matrix(), Matrix():
                return self.matrices(one, other)
            case Relation(), Relation():
                return self.relations(one, other)
            case Ratio(), Ratio():
                return self.ratios(one, other)
            case Text(), Text():
                return one.key == other.key
            case (Based(), Based()):
                return one == other
            case Clock(), Clock():
                return same_time(one, other)
            case (Clock(), Ratio() | Scalar()) | (Ratio() | Scalar(), Clock()):
                return self.clock_as_numbers(one, other)
            case (Text(key), Scalar(Symbol(name))) | (Scalar(Symbol(name)), Text(key)):
                return key == text_key(name)
        return self.one_in_braces(one, other)

    def one_in_braces(self, one: Answer, other: Answer) -> bool | None:
        r"""`\{5\}` is 5, but `\{\emptyset\}` is not empty; apart from that kinds do not mix."""
        for listing, single in ((one, other), (other, one)):
            if isinstance(listing, Listing) and len(listing.items) == 1 and listing.is_set:
                inside = listing.items[0]
                nested = isinstance(inside, Listing) and inside.is_set
                return single != _EMPTY and not nested and self.answers(inside, single)
        return False

    def items(self, one: Answer, other: Answer) -> bool | None:
        r"""What stands inside of something: `\{5\}` is not 5 there."""
        sets = [isinstance(side, Listing) and side.is_set for side in (one, other)]
        return sets[0] == sets[1] and self.answers(one, other)

    def choices(self, one: Answer, other: Answer) -> bool | None:
        """`C. 12` is C, and where C is not asked for it is 12."""
        if isinstance(one, Choice) and isinstance(other, Choice):
            return one.letter == other.letter and self.answers(one.content, other.content)
        choice, single = (one, other) if isinstance(one, Choice) else (other, one)
        assert isinstance(choice, Choice)
        if isinstance(single, Scalar) and isinstance(single.tree, Symbol):
            return single.tree.name == choice.letter
        return self.answers(choice.content, single)

    def clock_as_numbers(self, one: Answer, other: Answer) -> bool | None:
        """3:20 may look like a time and be a ratio; 9 a.m. may be asked for as 9."""
        clock, number = (one, other) if isinstance(one, Clock) else (other, one)
        assert isinstance(clock, Clock)
        times = (clock.hour, clock.minute, clock.second)
        parts = [Scalar(Number(Fraction(part))) for part in times]
        if isinstance(number, Ratio):
            if clock.half or not clock.minute:
                return False
            if not clock.second:
                parts = parts[:-1]
            return self.ratios(Ratio(tuple(parts)), number)
        if not clock.half or clock.minute or clock.second or _has_unit(number):
            return False
        return self.answers(parts[0], number)

    def labelled(self, one: Answer, other: Answer) -> bool | None:
        """x = 5 against 5, x = 5, y = 5 or 2x = 10; (x, y) = (1, 2) against x = 1, y = 2."""
        if isinstance(one, Labelled) and isinstance(other, Labelled):
            if one.label == other.label or _same_function(one, other):
                return self.answers(one.value, other.value)
            return self.equations(one.equation, other.equation)
        named, bare = (one, other) if isinstance(one, Labelled) else (other, one)
        assert isinstance(named, Labelled)
        if isinstance(bare, Relation):
            return self.equations(named.equation, bare)
        if isinstance(bare, Listing) and isinstance(named.value, Bracketed):
            return self.assignments(named, bare)
        return self.answers(named.value, bare)

    def assignments(self, one: Answer, other: Answer) -> bool | None:
        """x = 1, y = 2 is the point (1, 2); where the point names its coordinates, in any order."""
        sides = {side.__class__: side for side in (one, other)}
        listing, point = sides.pop(Listing), next(iter(sides.values()))
        assert isinstance(listing, Listing)
        items = {item.label: item for item in listing.items if isinstance(item, Labelled)}
        if not 1 < len(listing.items) == len(items):
            return False
        order = list(items)
        if isinstance(point, Labelled):
            names, point = point.label.strip("()").split(","), point.value
            order = names if sorted(names) == sorted(order) else order
        if not isinstance(point, Bracketed) or point.brackets != "()":
            return False
        return self.in_order(tuple(items[name].value for name in order), point.items)

    def equations(self, one: Relation | None, other: Relation | None) -> bool | None:
        return False if one is None or other is None else self.relations(one, other)

    def scalars(self, one: Scalar, other: Scalar) -> bool | None:
        percents = (one.unit == PERCENT) + (other.unit == PERCENT)
        if percents == 1 and "" in (one.unit, other.unit):
            same = self.prove(one.tree, other.tree)
            if same is not False:
                return same
            trees = [
                Operation("*", (side.tree, _PERCENT)) if side.unit else side.tree
                for side in (one, other)
            ]
            return self.prove(trees[0], trees[1])
        if not compatible(one.unit, other.unit):
            return False
        return self.prove(one.tree, other.tree)

    def listings(self, one: Listing, other: Listing) -> bool | None:
        """Repeating an element of a set, or a point, changes nothing; numbers count."""
        if (one.is_set and other.is_set) or all(map(_of_points, (one, other))):
            pairs = [(i, other.items) for i in one.items] + [(i, one.items) for i in other.items]
            return _all(_any(self.items(item, side) for side in among) for item, among in pairs)
        if (one.is_set or other.is_set) and any(len(_labels(s.items)) > 1 for s in (one, other)):
            return False
        return self.in_any_order(one.items, other.items)

    def in_order(self, ones: tuple[Answer, ...], others: tuple[Answer, ...]) -> bool | None:
        if len(ones) != len(others):
            return False
        return _all(self.items(one, other) for one, other in zip(ones, others, strict=True))

    def in_any_order(self, ones: tuple[Answer, ...], others: tuple[Answer, ...]) -> bool | None:
        """Each item has its own partner; names on one side only fix the order."""
        if len(ones) != len(others):
            return False
        labels, other_labels = (_labels(side) for side in (ones, others))
        if max(len(labels), len(other_labels)) > 1 and not (labels and other_labels):
            return self.in_order(ones, others)
        left = list(others)
        known = True
        for one in ones:
            results = [self.items(one, other) for other in left]
            if True in results:
                left.pop(results.index(True))
            elif None in results:
                known = False
                left.pop(results.index(None))
            else:
                return False
        return True if known else None

    def matrices(self, one: Matrix, other: Matrix) -> bool | None:
        if len(one.rows) != len(other.rows):
            return False
        return _all(self.in_order(*rows) for rows in zip(one.rows, other.rows, strict=True))

    def ratios(self, one: Ratio, other: Ratio) -> bool | None:
        """a : b equals c : d where ad = bc, with every two of their terms; 0 : 0 equals nothing."""
        if len(one.items) != len(other.items):
            return False
        trees = [[label_free(item) for item in side.items] for side in (one, other)]
        if not all(isinstance(item, Scalar) for side in trees for item in side):
            return self.in_order(one.items, other.items)
        left, right = ([item.tree for item in side if isinstance(item, Scalar)] for side in trees)
        if any(
            _all(self.prove(term, _ZERO) for term in side) is not False for side in (left, right)
        ):
            return False
        return _all(
            self.prove(Operation("*", (left[i], right[j])), Operation("*", (right[i], left[j])))
            for i, j in combinations(range(len(left)), 2)
        )

    def relations(self, one: Relation, other: Relation) -> bool | None:
        """Same sides, or one difference of sides a constant times the other."""
        flipped = tuple(FLIPPED[name] for name in reversed(other.operators))
        for operators, sides in (
            (other.operators, other.sides),
            (flipped, tuple(reversed(other.sides))),
        ):
            if one.operators == operators:
                same = _all(self.prove(a, b) for a, b in zip(one.sides, sides, strict=True))
                if same is not False:
                    return same
        if len(one.operators) != 1 or len(other.operators) != 1:
            return False
        same, sign = values.proportional(_difference(one), _difference(other))
        if not same:
            return same
        operator, expected = one.operators[0], other.operators[0]
        if operator in ("=", "!="):
            return operator == expected
        return sign != 0 and operator == (expected if sign > 0 else FLIPPED[expected])


def _has_unit(answer: Answer) -> bool:
    return isinstance(answer, Scalar) and bool(answer.unit)


def _labels(items: tuple[Answer, ...]) -> set[str]:
    return {item.label for item in items if isinstance(item, Labelled)}


def _of_points(listing: Listing) -> bool:
    return all(isinstance(item, Bracketed) for item in listing.items)


def _same_function(one: Labelled, other: Labelled) -> bool:
    """y = x + 1 and f(x) = x + 1 are one function; so are f(x) = 1 and f(n) = 1."""
    functions = [_FUNCTION.fullmatch(side.label) for side in (one, other)]
    if all(functions):
        names, arguments = zip(*(match.groups() for match in functions if match), strict=True)
        trees = [side.value.tree for side in (one, other) if isinstance(side.value, Scalar)]
        constant = len(trees) == 2 and not any(map(symbols, trees))
        return names[0] == names[1] and (arguments[0] == arguments[1] or constant)
    return any(functions) and "y" in (one.label, other.label)


def _difference(relation: Relation) -> Expression:
    left, right = relation.sides
    return Operation("+", (left, Operation("neg", (right,))))


def _all(results: Iterable[bool | None]) -> bool | None:
    known = True
    for result in results:
        if result is False:
            return False
        known &= result is True
    return True if known else None


def _any(results: Iterable[bool | None]) -> bool | None:
    known: bool | None = False
    for result in results:
        if result:
            return True
        known = None if result is None else known
    return known
