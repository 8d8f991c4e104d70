"""The kinds of answers there are."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.verify.expression import Expression


@dataclass(frozen=True, slots=True)
class Scalar:
    """One expression, with the unit it is measured in ("" if none)."""

    tree: Expression
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Several answers beside each other, in no order; `is_set` where braces say so."""

    items: tuple[Answer, ...]
    is_set: bool = False


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A tuple, point or interval: its items in order, and its brackets, as in "[)"."""

    items: tuple[Answer, ...]
    brackets: str


@dataclass(frozen=True, slots=True)
class Union:
    """A union of sets."""

    parts: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of equal or unequal length."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """Sides joined by operators out of = < > <= >= !=."""

    sides: tuple[Expression, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A value under a name, as in x = 5 or x > 5; `equation` says it as a relation, if it can."""

    label: str
    value: Answer
    equation: Relation | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """a : b : c"""

    items: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral in a base that is written with it."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day; `half` is "a" or "p" where it is written, and empty where it is not."""

    hour: int
    minute: int
    second: int
    half: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice letter together with what that choice says."""

    letter: str
    content: Answer


@dataclass(frozen=True, slots=True)
class Text:
    """Words, as a key without case, spacing and punctuation."""

    key: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """Mathematics this module cannot take apart."""

    text: str


Answer = (
    Scalar | Listing | Bracketed | Union | Matrix | Relation | Labelled | Ratio | Based | Clock
    | Choice | Text | Opaque
)  # fmt: skip
