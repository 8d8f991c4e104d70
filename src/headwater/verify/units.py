r"""What may stand around a number without changing it: currency, percent, degrees, units, words.

`split_unit` takes it off and says what it was; words that could change the meaning ("not", "or",
"less than") are never a unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from headwater.verify.tokens import CONSTANTS, GREEK

GENERIC = "unit"
PERCENT = "%"
DEGREE = "degree"

_SYNONYMS = {
    name: unit
    for unit, names in {
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
        "km": "kilometer kilometre", "inch": "in inches", "foot": "ft feet", "yard": "yd",
        "mile": "mi", "g": "gram gramme gm", "kg": "kilogram kilo kilogramme", "mg": "milligram",
        "pound": "lb lbs", "ounce": "oz", "second": "s sec secs", "minute": "min mins",
        "hour": "h hr hrs", "day": "", "week": "wk", "month": "", "year": "yr yrs",
        "liter": "l litre", "ml": "milliliter millilitre", "gallon": "gal",
        "$": "dollar usd buck", "cent": "c", "£": "gbp", "€": "euro eur", "¥": "yen yuan",
        PERCENT: "percent pct percentage", DEGREE: "degrees deg", GENERIC: "units",
        "square": "sq squares", "cubic": "cu", "people": "person persons", "radian": "rad rads",
        "mol": "mole", "rupee": "rs", "mph": "", "kmh": "kph kmph", "joule": "", "newton": "",
        "child": "children", "man": "men", "woman": "women", "die": "dice", "mouse": "mice",
    }.items()
    for name in [unit, *names.split()]
}  # fmt: skip
#: Single letters that are units; any other (i, e, M for a million) could mean something else.
_LETTERS = {
    "m": "m", "g": "g", "s": "second", "h": "hour", "l": "liter", "L": "liter", "c": "cent",
    "N": "newton", "J": "joule", "V": "volt", "W": "watt",
}  # fmt: skip
_MULTIPLIERS = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "millions": 10**6, "billion": 10**9,
    "billions": 10**9, "trillion": 10**12, "dozen": 12, "dozens": 12,
}  # fmt: skip
_CHANGES_MEANING = frozenset(
    {
        "not", "no", "never", "none", "isn", "isnt", "t", "wrong", "false", "incorrect",
        "error", "or", "and", "either", "neither", "nor", "maybe", "perhaps", "possibly",
        "probably", "approximately", "approx", "about", "around", "roughly", "nearly", "almost",
        "less", "more", "fewer", "greater", "larger", "smaller", "than", "over", "under",
        "most", "least", "between", "minus", "plus", "times", "divided", "squared", "cubed",
        "is", "are", "was", "were", "if", "unless", "except", "without", "unknown", "undefined",
        "impossible", "mod", "modulo", "remainder", "base", "factorial", "power", "root",
        "sqrt", "to", "from", "but", "wait", "actually", "answer",
        "half", "quarter", "third", "twice", "double", "triple", "other", "first", "last",
        "negative", "positive", "else", "instead", "both", "all", "sin", "cos", "tan",
        "cot", "sec", "csc", "log", "ln", "exp", "lim", "where", "when", "such", "that",
        "infinity", "infinite", "many", "x", "y", "z", "k", "ish", "etc", "excluding", "otherwise",
        "likely", "guess", "think", "sure", "estimate", "estimated", "higher", "lower", "invalid",
        "repeating", "recurring", "tenth", "tenths", "hundredth", "hundredths", "thousandth",
        "thousandths", "halves", "thirds", "quarters", "lakh", "lakhs", "crore", "crores", "gross",
        "below", "above", "nope", "nah", "rejected", "excluded", "unlikely", "hopefully", "cannot",
        "fails", "failed", "rounded", "choose", "reciprocal", "increased", "decreased", "reduced",
        "verdict", "opposite", "inverse", "conjugate",
    }
)  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the", "of"})
_FILLERS = _ARTICLES | frozenset(
    {
        "per", "total", "each", "old", "long", "away", "left",
    }
)  # fmt: skip
_MONEY = r"(?:US ?)?(?:\\\$|[£€¥]|USD|EUR|GBP|Rs\.?(?![a-z]))"
_CURRENCY = re.compile(rf"^([+-]? ?)(?:({_MONEY})|\\text ?\{{ ?({_MONEY}) ?\}})\s*")
_CURRENCY_UNITS = {"EUR": "€", "GBP": "£", "Rs": "rupee", "Rs.": "rupee"}
_RATES = {"mile hour": "mph", "kmh": "km hour"}
_QUOTIENT = re.compile(
    r"\\frac ?\{ ?\\text ?\{([^{}]*)\} ?\} ?\{ ?\\text ?\{([^{}]*)\} ?\}"
    r"|\\text ?\{([^{}]*)\} ?/ ?\\text ?\{([^{}]*)\}"
)
_MEASURED_TEXT = re.compile(r"^\\text ?\{ ?([+-]?[\d./]*\d) ([A-Za-z][^{}]*)\}$")
_RAISED_UNIT = re.compile(r"(\\text ?\{[^{}]*\^) ?\{ ?([23]) ?\}")
_TRAILING_CHINESE = re.compile(
    "(?<=[0-9})])[个元米厘毫千克度小时分钟秒天年岁月人平立方单位升只本种次块斤公里]+$"
)
_TRAILING_TEXT = re.compile(r"\\text ?\{([^{}]*)\}(?: ?\^ ?\{? ?([23]) ?\}?)?$")
_TRAILING_CURRENCY = re.compile(r"(?:\\\$|[£€¥])$")
_TRAILING_DEGREES = re.compile(r"\^ ?\{? ?\\circ ?\}?(?: ?\\text ?\{ ?([CF]) ?\}| ?([CF]))?$")
_ANGLE_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
_TRAILING_WORDS = re.compile(
    r"(?<=[\d\s}).])([A-Za-z]+\.?(?:(?: ?/ ?| |-)[A-Za-z]+\.?)*)(?: ?\^ ?\{? ?([23]) ?\}?)?$"
)
_NEVER_GENERIC = frozenset({PERCENT, DEGREE, "$", "€", "£", "¥"})
_SHORTEST_UNKNOWN_WORD = 4
_MOST_WORDS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """A number's text, what it is measured in ("" if nothing), and what a word multiplies it by."""

    body: str
    unit: str
    multiplier: Fraction = Fraction(1)


def split_unit(text: str) -> Measured:
    r"""Take currency signs, percent and degree signs and unit words off a number.

    >>> split_unit(r"864 \text{ inches}^2"), split_unit("2 million").multiplier
    (Measured(body='864', unit='inch^2', multiplier=Fraction(1, 1)), Fraction(1000000, 1))
    >>> split_unit("7 is wrong").unit
    ''
    """
    unit, multiplier = "", Fraction(1)
    if "\\text" in text:
        text = _RAISED_UNIT.sub(r"\1\2", _QUOTIENT.sub(_quotient, text))
        text = _MEASURED_TEXT.sub(r"\1 \\text{\2}", text)
    if money := _CURRENCY.match(text):
        sign = (money.group(2) or money.group(3)).removeprefix("US").strip()
        unit = _CURRENCY_UNITS.get(sign, sign if sign in "£€¥" else "$")
        text = money.group(1) + text[money.end() :]
    for _ in range(_MOST_WORDS):
        found = _trailing(text.rstrip())
        if found is None or not found.body.strip(" +-") or (found.unit and unit == PERCENT):
            break
        text = found.body.rstrip()
        multiplier *= found.multiplier
        unit = _joined(unit, found.unit)
    return Measured(text.strip(), unit, multiplier)


def _joined(unit: str, earlier: str) -> str:
    """Both units, currency first; what a percentage is of says nothing of its own."""
    if not unit or earlier in ("", unit, PERCENT):
        return earlier or unit
    return f"{unit} {earlier}" if unit in _NEVER_GENERIC else f"{earlier} {unit}"


def _quotient(units: re.Match[str]) -> str:
    over, under = (part for part in units.groups() if part is not None)
    return rf"\text{{{over}/{under}}}"


def compatible(one: str, other: str) -> bool:
    """Whether two units may be the same: one left out may be any, "units" any of its power.

    A currency may leave out what it is paid for.

    >>> compatible("cm^2", ""), compatible("cm^2", "unit^2"), compatible("cm^2", "unit")
    (True, True, False)
    """
    if one == other or not one or not other:
        return True
    if any(
        short in _NEVER_GENERIC and long.startswith(f"{short} ")
        for short, long in ((one, other), (other, one))
    ):
        return True
    names, powers = zip(*(unit.partition("^")[::2] for unit in (one, other)), strict=True)
    return GENERIC in names and powers[0] == powers[1] and not _NEVER_GENERIC.intersection(names)


def _trailing(text: str) -> Measured | None:
    if text.endswith("%"):
        return Measured(text[:-1].rstrip("\\"), PERCENT)
    if currency := _TRAILING_CURRENCY.search(text):
        return Measured(text[: currency.start()], currency.group().lstrip("\\"))
    degrees = _TRAILING_DEGREES.search(text)
    if degrees and not _ANGLE_FUNCTION.search(text):
        scale = degrees.group(1) or degrees.group(2) or ""
        return Measured(text[: degrees.start()], DEGREE + scale)
    if chinese := _TRAILING_CHINESE.search(text):
        return Measured(text[: chinese.start()], chinese.group())
    words = _TRAILING_TEXT.search(text)
    raw = words is None
    if words is None:
        words = _TRAILING_WORDS.search(text[-80:])
    if words is None:
        return None
    body = text[: len(text) - len(words.group())]
    if raw and not re.search(r"[\d})]\s*$", body):
        return None
    unit = _unit_of(words.group(1), words.group(2), raw, set_apart=body[-1:].isspace())
    if unit is None:
        return None
    return Measured(body, unit.unit, unit.multiplier)


def _unit_of(text: str, exponent: str | None, raw: bool, set_apart: bool) -> Measured | None:
    r"""What unit words say; None for words that are none.

    Raw letters (outside `\text`) could be variables: short or unknown ones are then no unit,
    and unknown ones must be set apart by a space.
    """
    names: list[str] = []
    multiplier = Fraction(1)
    power = exponent or ""
    words = re.findall(r"[A-Za-z%]+(?: ?\^ ?[23](?!\d))?|\d", text)
    if not words or len(words) > _MOST_WORDS + 2:
        return None
    for piece in words:
        word, _, raised = piece.replace(" ", "").partition("^")
        lower = word.lower()
        if lower in _CHANGES_MEANING or word.isdigit() or word in GREEK | CONSTANTS:
            return None
        if len(word) == 1 and (raw or word not in _LETTERS):
            return None
        if lower in _MULTIPLIERS:
            multiplier *= _MULTIPLIERS[lower]
        elif lower not in _FILLERS:
            known = _known(word)
            long_enough = len(word) >= (2 if known else _SHORTEST_UNKNOWN_WORD)
            if raw and not (long_enough and (known or set_apart)):
                return None
            names.append((known or _singular(lower)) + (f"^{raised}" if raised else ""))
    if not names and multiplier == 1 and _ARTICLES.issuperset(map(str.lower, words)):
        return None
    if len(names) > 1 and names[0] in ("square", "cubic"):
        power = "2" if names[0] == "square" else "3"
        names = names[1:]
    unit = " ".join(names) + (f"^{power}" if power else "")
    return Measured("", _RATES.get(unit, unit), multiplier)


def _known(word: str) -> str | None:
    if word in _LETTERS:
        return _LETTERS[word]
    lower = word.lower()
    for form in (lower, lower.removesuffix("s")):
        if form in _SYNONYMS:
            return _SYNONYMS[form]
    return None


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
