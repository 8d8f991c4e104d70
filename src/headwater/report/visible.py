"""Text of models and data sets, made safe to look at.

A response may hold escape sequences that repaint a terminal, or bidirectional controls that
make it read differently from what it says. Neither is dropped: each such character is shown
by a visible stand-in.
"""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """Text with every control, format, surrogate and unassigned character made visible.

    Each becomes `<U+XXXX>`; newline and tab stay.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a<U+001B>[31mb<U+202E>c'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_stand_in(character) for character in text)


def excerpt(text: str, limit: int) -> str:
    """The text, or its beginning and end with a count of what lies between.

    >>> excerpt("abcdefghij", 6)
    'abc\\n[... 4 characters not shown ...]\\nhij'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out:,} characters not shown ...]\n{text[-half:]}"


def _stand_in(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    return f"<U+{ord(character):04X}>"
