r"""Taking a text apart outside its brackets, and telling names of values from values."""

from __future__ import annotations

import re
from collections.abc import Callable

from headwater.verify.tokens import FUNCTIONS, MAX_NESTING, PastLimits

_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_APPLICATION = re.compile(
    r"(?<![A-Za-z])[fghpqFGHPQRST]'?(?:_\w|_\{\w+\})?(?: ?\^ ?\{ ?-1 ?\})? ?\([^()]*\)"
)
_SUBSCRIPT = re.compile(r"_ ?(?:\w|\{[^{}]*\})|(?<=[A-Za-z])\d(?![\d.])")
_LABEL = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z'|:,(){} ])+")
_LONGEST_LABEL = 60
_OPENING, _CLOSING = "([{", ")]}"


def is_label(text: str) -> bool:
    r"""Whether text names a value (`x`, `f(2)`, `(p, q)`, `V_1 : V_2`, `\frac{NO}{BO}`).

    A name has letters and no operators, digits only in subscripts (`x_1`, `x1`) and arguments.
    """
    text = text.strip()
    if not text or len(text) > _LONGEST_LABEL:
        return False
    bare = _SUBSCRIPT.sub("", _APPLICATION.sub("f", _TEXT.sub(" \\1 ", text)))
    if not _LABEL.fullmatch(bare) or bare.count("|") % 2 or not re.search(r"[A-Za-z]", bare):
        return False
    names = re.findall(r"[A-Za-z]+", bare)
    words = [name if len(name) == 1 or name.isupper() else name.lower() for name in names]
    return not any(word in FUNCTIONS or word in _NO_LABELS for word in words)


_NO_LABELS = frozenset(
    {
        "pi", "e", "i", "infty", "not", "or", "and", "emptyset", "mathbb", "sum", "prod", "int",
        "lim", "cup", "cap", "least", "most", "about", "than", "maybe", "perhaps", "approximately",
        "roughly", "around", "more", "less", "between", "either", "neither", "nor", "never", "no",
        "isn", "isnt", "cannot", "if", "but", "almost", "nearly", "wrong", "incorrect", "false",
        "unless", "unlikely", "possibly", "probably", "only", "half", "twice", "double", "triple",
        "minus", "plus", "times", "neg", "lnot", "nexists", "cancel", "xcancel", "bcancel", "sout",
    }
)  # fmt: skip


def is_single_name(label: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z]'?|\\[a-z]+", _SUBSCRIPT.sub("", label.strip())))


def label_key(label: str) -> str:
    return re.sub(r"\\text|[\s{}_]", "", label)


def without_outer_braces(text: str) -> str:
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and encloses(text):
        text = text[1:-1].strip()
    return text


def encloses(text: str) -> bool:
    """Whether the first bracket closes at the very end."""
    return all(depth > 0 for place, depth in _depths(text) if 0 < place < len(text) - 1)


def _depths(text: str) -> list[tuple[int, int]]:
    """(place, bracket depth) of every letter; an opening bracket counts from itself on."""
    depths, depth = [], 0
    for place, letter in enumerate(text):
        if letter in _OPENING:
            depth += 1
            depths.append((place, depth))
        else:
            depth -= letter in _CLOSING
            depths.append((place, depth))
    return depths


def check_nesting(text: str) -> None:
    if max((depth for _, depth in _depths(text)), default=0) > MAX_NESTING:
        raise PastLimits("nested too deeply")


def split_at_signs(text: str, signs: str) -> list[str]:
    return _cut(text, [(p, p + 1) for p, letter in enumerate(text) if letter in signs])


def split_at(text: str, separator: re.Pattern[str], found: list[str] | None = None) -> list[str]:
    """Split outside brackets; `found` collects the separators (their first group, or whole)."""
    places = []
    outside = _outside(text)
    for match in separator.finditer(text):
        if outside(match.start()):
            places.append(match.span())
            if found is not None:
                found.append(next(filter(None, match.groups()), match.group()))
    return [piece.strip() for piece in _cut(text, places)]


def _outside(text: str) -> Callable[[int], bool]:
    depths = _depths(text)
    return lambda place: depths[place][1] <= 0


def _cut(text: str, spans: list[tuple[int, int]]) -> list[str]:
    outside = _outside(text)
    pieces, since = [], 0
    for start, end in spans:
        if outside(start):
            pieces.append(text[since:start])
            since = end
    pieces.append(text[since:])
    return pieces
