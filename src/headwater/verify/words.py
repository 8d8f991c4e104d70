r"""Answers in words: text, numbers spelled out, multiple-choice letters and times of day.

Text is compared by a key that forgets case, spacing and punctuation, but not signs, brackets
that do not close, or where one number ends and the next begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from headwater.verify.expression import Number, Symbol
from headwater.verify.kinds import Answer, Choice, Clock, Scalar, Text
from headwater.verify.tokens import FUNCTIONS
from headwater.verify.units import split_unit

TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
AND_OR = re.compile(
    r"\\text ?\{[\s,;]*(and|or|,|;)[\s,;]*\}|(?<![A-Za-z\\])(and|or)(?![A-Za-z])"
    r"|(?<=[\d)\]}])(and|or)(?=[A-Z(\[\\])"
)
_UNITS_IN_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS_IN_WORDS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = {
    name: number
    for number, name in [
        *enumerate(_UNITS_IN_WORDS),
        *((20 + 10 * place, name) for place, name in enumerate(_TENS_IN_WORDS)),
        *(
            (20 + 10 * place + digit, tens + _UNITS_IN_WORDS[digit])
            for place, tens in enumerate(_TENS_IN_WORDS)
            for digit in range(1, 10)
        ),
    ]
}
_CONSTANT_WORDS = frozenset({"pi", "inf", "infty", "infinity"})
_WORDS = re.compile(r"[A-Za-z\d .,;:'\"!?()\-]+")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_KEY_PIECES = re.compile(r"[^\W\d_]+|\d+(?:[.,:/]\d+)*|[^\s\w]|_")
_DROPPED = frozenset('.,;:"$~`')
_LEAD_IN = r"(?:the )?(?:(?:final|correct) )?(?:answer|option|choice)(?: is)?:?"
_LEAD_IN_TEXT = re.compile(rf"\\text ?\{{ ?{_LEAD_IN} ?\}} ?(.+)", re.IGNORECASE | re.DOTALL)
_LEAD_IN_RAW = re.compile(rf"{_LEAD_IN}(?: (.+)|(\(.+))", re.IGNORECASE | re.DOTALL)
_CHOICE_TEXT = re.compile(r"^\\text ?\{ ?(\(?[A-J][.)])( [^{}]*)?\}")
_CHOICE = re.compile(r"(?:([A-J])[.)]|\(([A-J])\)) (.+)", re.DOTALL)
_CHOICE_ALONE = re.compile(r"([A-J])\)|\\text ?\{ ?([A-J])\) ?\}")
_CONTENT = re.compile(r"[\w(\[{$]|-(?=[\w\\])|\\(?:d?frac|sqrt|text|pi|infty|begin|\{)(?![a-z])")
_NO_CONTENT = re.compile(
    r"(?<![A-Za-z\\])(?:[A-J][.)]|\([A-J]\)|(?:or|not|nor|maybe|perhaps|possibly|probably|either"
    r"|neither|unsure|wrong|incorrect|squared|cubed|root|mod)\b)|^and\b"
)
_CLOCK = re.compile(
    r"(\d{1,2})(?: ?: ?([0-5]\d)(?: ?: ?([0-5]\d))?)?(?: ?([ap])(?:\.? ?m\b)\.?)?", re.IGNORECASE
)


def mathematical(word: str) -> bool:
    """Whether a run of letters may be a function, a constant or a product of variables."""
    if word in FUNCTIONS or word in _CONSTANT_WORDS:
        return True
    return "".join(sorted(word)) == word and not (len(word) > 2 and word.istitle())


def text_key(text: str) -> str:
    """What text says, without case, spacing, hyphens and punctuation.

    >>> text_key("No real solutions."), text_key("June 20"), text_key("June 2, 0")
    ('norealsolutions', 'june20', 'june2 0')
    """
    pieces = _KEY_PIECES.findall(text.casefold())
    closed = pieces.count("(") == pieces.count(")")
    key = ""
    for place, piece in enumerate(pieces):
        around = [*pieces[max(place - 1, 0) : place], *pieces[place + 1 : place + 2]]
        inside = piece in "-'" and len(around) == 2 and all(side.isalpha() for side in around)
        if piece in _DROPPED or inside or (closed and piece in "()"):
            continue
        key += " " + piece if key[-1:].isdigit() and piece[0].isdigit() else piece
    return key


def words_of(text: str) -> list[str]:
    """The words of three letters and more that are no mathematics."""
    return [word for word in _WORD.findall(text) if not mathematical(word)]


def read_words(text: str) -> Answer | None:
    """Words as text, unless they are units, separators or names of functions and variables."""
    if any(sign in text for sign in "=<>^_+*/&|") or "," in text or ";" in text:
        return None
    flat = TEXT.sub(r" \1 ", text)
    if not _WORDS.fullmatch(flat) or AND_OR.search(text):
        return None
    key = text_key(flat)
    if key in NUMBER_WORDS:
        return Scalar(Number(Fraction(NUMBER_WORDS[key])))
    return Text(key) if words_of(flat) and split_unit(text).body == text else None


def without_lead_in(text: str) -> str:
    r"""The answer without "the answer is" or "option" in front of it.

    >>> without_lead_in(r"\text{The answer is } 5"), without_lead_in("Option B")
    ('5', 'B')
    """
    if "swer" not in text and "ption" not in text and "hoice" not in text:
        return text
    whole = TEXT.fullmatch(text)
    if match := _LEAD_IN_TEXT.fullmatch(text):
        return match.group(1)
    match = _LEAD_IN_RAW.fullmatch(whole.group(1).strip() if whole else text)
    return (match.group(1) or match.group(2)).strip() if match else text


def read_choice(text: str, read: Callable[[str], Answer]) -> Answer | None:
    r"""A lettered choice with what it says: `C. 12`, `(C) 12`, `\text{(C)} 12`; or `C)` alone."""
    if text[:1] not in "(\\ABCDEFGHIJ":
        return None
    if alone := _CHOICE_ALONE.fullmatch(text):
        return Scalar(Symbol(alone.group(1) or alone.group(2)))
    match = _CHOICE.fullmatch(_CHOICE_TEXT.sub(r"\1\2", text))
    content = match.group(3).strip() if match else ""
    if match is None or not _CONTENT.match(content) or _NO_CONTENT.search(content):
        return None
    return Choice(match.group(1) or match.group(2), read(content))


def read_clock(text: str) -> Answer | None:
    """A time of day: `3:45`, `15:45:00`, `3:45 p.m.`, `9 am`."""
    if not any(digit in text[:7] for digit in "0123456789"):
        return None
    match = _CLOCK.fullmatch(" ".join(TEXT.sub(r" \1 ", text).split()))
    if match is None or (match.group(2) is None and match.group(4) is None):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    half = (match.group(4) or "").lower()
    if hour > 24 or (half and not 1 <= hour <= 12):
        return None
    return Clock(hour, minute, second, half)


def same_time(one: Clock, other: Clock) -> bool:
    """Whether two times agree; one without a half of the day may be in either, up to 12 o'clock."""
    if (one.minute, one.second) != (other.minute, other.second):
        return False
    if (one.half or one.hour > 12) and (other.half or other.hour > 12):
        return _hour_of_day(one) == _hour_of_day(other)
    return one.hour == other.hour or (
        bool(one.half or other.half) and one.hour % 12 == other.hour % 12
    )


def _hour_of_day(clock: Clock) -> int:
    if not clock.half:
        return clock.hour
    return clock.hour % 12 + (12 if clock.half == "p" else 0)
