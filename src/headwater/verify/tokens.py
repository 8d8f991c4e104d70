"""Splitting an expression in common notation into tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 2000
MAX_NESTING = 40
MAX_NODES = 1500


class Unreadable(ValueError):
    """The text is not an expression this reader knows; says nothing about the text itself."""


class PastLimits(ValueError):
    """The text is longer or deeper than anything worth reading."""


class TooLarge(PastLimits):
    """A number in it is larger than anything worth computing."""


FUNCTIONS = frozenset(
    {
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh",
        "tanh", "log", "ln", "lg", "exp", "sqrt", "abs", "floor", "ceil", "binom",
    }
)  # fmt: skip
_PLAIN_NAMES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "inf": "infty", "infinity": "infty",
    "Infinity": "infty", "oo": "infty",
}  # fmt: skip
CONSTANTS = frozenset({"pi", "infty"})
GREEK = frozenset(
    {
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
        "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi",
        "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi",
        "Psi", "Omega", "ell", "hbar", "emptyset",
    }
)  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.(?!\.)\d*)?|\.\d+)(?P<power>[eE][+-]?\d+(?![\d.]))?"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<letters>[A-Za-z]+)|(?P<sign>\\[^a-zA-Z]|.))",
    re.DOTALL,
)
_SHORTHANDS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\%": "%", "\\{": "{(", "\\}": ")}"}
_MAX_EXPONENT_DIGITS = 4
_NO_NAMES = frozenset({"not", "no", "nor", "never", "and", "or", "but", "except", "if", "is"})


@dataclass(frozen=True, slots=True)
class Token:
    """A number with its value, a known name, a letter or word, a sign, or the end."""

    kind: str  # "number", "name" (a \command or a word), "letter", "sign", "end"
    text: str
    spaced: bool = False
    value: Fraction | None = None


def tokens_of(text: str) -> list[Token]:
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text.rstrip()):
        spaced = match.start() != match.start(match.lastgroup or 0)
        number, power = match.group("number"), match.group("power")
        if number is not None:
            if power is not None and len(power.lstrip("eE+-")) > _MAX_EXPONENT_DIGITS:
                raise TooLarge("exponent too large")
            value = _decimal(number) * (Fraction(10) ** int(power[1:]) if power else 1)
            tokens.append(Token("number", number, spaced, value))
        elif command := match.group("command"):
            tokens.append(_command_token(command, spaced))
        elif letters := match.group("letters"):
            tokens += _word_tokens(letters, spaced)
        else:
            sign = match.group("sign")
            tokens.append(Token("sign", _SHORTHANDS.get(sign, sign), spaced))
    tokens.append(Token("end", ""))
    return tokens


def _decimal(digits: str) -> Fraction:
    whole, _, part = digits.partition(".")
    return Fraction(int((whole + part) or "0"), 10 ** len(part))


def _command_token(command: str, spaced: bool) -> Token:
    if command in _SHORTHANDS:
        return Token("sign", _SHORTHANDS[command], spaced)
    return Token("name", command[1:], spaced)


def _word_tokens(letters: str, spaced: bool) -> list[Token]:
    """Split a run of letters: a known name, an opaque word, or one-letter variables."""
    if letters.lower() in _NO_NAMES:
        raise Unreadable("a word that joins or denies")
    name = _PLAIN_NAMES.get(letters, letters)
    if name in FUNCTIONS or name in CONSTANTS or name in GREEK:
        return [Token("name", name, spaced)]
    in_order = "".join(sorted(letters)) == letters and not letters.istitle()
    if len(letters) >= 3 and not in_order and re.search("[aeiouAEIOU]", letters):
        return [Token("letter", letters, spaced)]
    if len(letters) > 4:
        return [Token("letter", letters, spaced)]
    return [Token("letter", letter, spaced and not place) for place, letter in enumerate(letters)]
