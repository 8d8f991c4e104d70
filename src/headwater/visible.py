"""Text of models, data sets and recipes, made safe to look at.

A response may hold escape sequences that repaint a terminal, bidirectional controls that make it
read differently from what it says, or characters that take no place at all. None is dropped: each
such character is shown by a visible stand-in.
"""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_MARK_CATEGORIES = frozenset({"Mn", "Me"})
_MOST_MARKS = 4  # on one letter; the most that a language writes
#: Marks and letters that are drawn as nothing: joiners, fillers, vowels never written, blanks,
#: and variation selectors, but for the one that ordinary emoji are written with.
_DRAWN_AS_NOTHING = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F),
            *(0x2800, 0x3164, 0xFFA0, *range(0xFE00, 0xFE0F), *range(0xE0100, 0xE01F0)),
        ),
    )
)
#: What a formula begins with, in the wide letters of East Asian spreadsheets too.
_FORMULAS = frozenset(
    "=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}"
    "\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)
#: Longer than anything a person wrote to be read in one place.
LONGEST_SHOWN = 200_000


def visible(text: str) -> str:
    """Text with every control, format, surrogate, unassigned and empty character made visible.

    Each becomes `<U+XXXX>`; newline and tab stay. So does each mark above or below a letter but
    the first few, which would cover other lines.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a<U+001B>[31mb<U+202E>c'
    """
    if text.isascii() and text.isprintable():
        return text
    shown: list[str] = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in _MARK_CATEGORIES else 0
        hidden = category in _HIDDEN_CATEGORIES or character in _DRAWN_AS_NOTHING
        if (hidden and character not in _KEPT) or marks > _MOST_MARKS:
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    return "".join(shown)


def excerpt(text: str, limit: int = LONGEST_SHOWN) -> str:
    """The text, or its beginning and end with a count of what lies between.

    >>> excerpt("abcdefghij", 6)
    'abc\\n[... 4 of 10 characters not shown ...]\\nhij'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = len(text) - 2 * half
    note = f"[... {left_out:,} of {len(text):,} characters not shown ...]"
    return f"{text[:half]}\n{note}\n{text[-half:]}"


def one_line(text: str, limit: int = 2_000) -> str:
    """`visible` text on one line of bounded length, as for an error or a warning.

    >>> one_line("a\\nb\\x07", 40)
    'a b<U+0007>'
    """
    shown = visible(text[: limit + 1]).replace("\n", " ").replace("\t", " ")
    return shown if len(text) <= limit else f"{shown[:limit]}... ({len(text):,} characters)"


def csv_text(text: str) -> str:
    """`visible` text for a cell; what a spreadsheet would take for a formula gets an apostrophe.

    >>> csv_text("=1+1"), csv_text("1+1")
    ("'=1+1", '1+1')
    """
    shown = visible(text)
    return f"'{shown}" if shown.lstrip()[:1] in _FORMULAS else shown
