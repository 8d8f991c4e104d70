r"""Reading one mathematical expression, LaTeX or plain, into a small tree.

The input is in the notation of `notation.normalise`. The reader is a recursive descent over
tokens with limits on length and nesting; it evaluates nothing and looks nothing up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from headwater.verify.tokens import (
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    MAX_CHARACTERS,
    MAX_NESTING,
    MAX_NODES,
    PastLimits,
    Token,
    Unreadable,
    tokens_of,
)


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, or a named constant ("pi", "e", "i", "infty") where it is spelled so."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`operator` is "+" or "*" (any number of operands), "inv" (one over), "^", "neg", "!", or a
    function's name."""

    operator: str
    operands: tuple[Expression, ...]


Expression = Number | Symbol | Operation

_NOTHING = Symbol("emptyset")
#: Before a bracket these are functions nobody knows more of, not factors.
_FUNCTION_LETTERS = frozenset("fg")
_MOST_CORNERS = 3

_DECORATIONS = frozenset(
    {
        "overline", "bar", "vec", "hat", "tilde", "overrightarrow", "mathbb", "mathcal", "angle",
        "triangle",
    }
)  # fmt: skip


def read_expression(text: str) -> Expression:
    r"""Return the tree of one expression; raise Unreadable or PastLimits.

    >>> read_expression("7 3/4")
    Number(value=Fraction(31, 4))
    >>> read_expression(r"\frac12x").operator
    '*'
    """
    if len(text) > MAX_CHARACTERS:
        raise PastLimits("too long")
    reader = _Reader(tokens_of(text))
    tree = reader.group()
    reader.expect_end()
    return tree


class _Reader:
    """Recursive descent; `position` is the next token, `bars` counts open `|`."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.nodes = 0
        self.bars = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.position]

    def take(self) -> Token:
        token = self.next
        self.position += token.kind != "end"
        return token

    def accept(self, *signs: str) -> str | None:
        if self.next.kind == "sign" and self.next.text in signs:
            return self.take().text
        return None

    def expect(self, sign: str) -> None:
        if self.accept(sign) is None:
            raise Unreadable("bracket missing")

    def expect_end(self) -> None:
        if self.next.kind != "end":
            raise Unreadable("something is left over")

    def node(self, operator: str, *operands: Expression) -> Operation:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise PastLimits("too many operations")
        if _NOTHING in operands:
            raise Unreadable("arithmetic with the empty set")
        return Operation(operator, operands)

    def nested(self, read: Callable[[], Expression]) -> Expression:
        """Read one level deeper, within the limit."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise PastLimits("nested too deeply")
        value = read()
        self.depth -= 1
        return value

    def signed(self, read: Callable[[], Expression]) -> Expression:
        negative = False
        while sign := self.accept("+", "-"):
            negative ^= sign == "-"
        value = read()
        return self.node("neg", value) if negative else value

    def group(self) -> Expression:
        r"""sum (`\over` sum | `\choose` sum)?"""
        value = self.sum()
        if self.next.kind != "name" or self.next.text not in ("over", "choose"):
            return value
        name, under = self.take().text, self.sum()
        if name == "choose":
            return self.node("binom", value, under)
        return self.node("*", value, self.node("inv", under))

    def sum(self) -> Expression:
        """term (('+' | '-') term)*"""
        terms = [self.signed(self.product)]
        while sign := self.accept("+", "-"):
            term = self.signed(self.product)
            terms.append(term if sign == "+" else self.node("neg", term))
        return terms[0] if len(terms) == 1 else self.node("+", *terms)

    def product(self) -> Expression:
        """factor (('*' | '/' | nothing) factor)*, from the left."""
        factors = [self.factor()]
        while True:
            if sign := self.accept("*", "/"):
                factor = self.signed(self.factor)
                factors.append(factor if sign == "*" else self.node("inv", factor))
            elif self.starts_factor():
                if self.next.kind == "number" and not self.between_powers(factors[-1]):
                    raise Unreadable("two numbers side by side")
                factors.append(self.power())
            else:
                return factors[0] if len(factors) == 1 else self.node("*", *factors)

    def between_powers(self, before: Expression) -> bool:
        """Whether the next number follows a power and is the base of one, as in `2^3 5^2`."""
        after = self.tokens[self.position + 1]
        power = isinstance(before, Operation) and before.operator == "^"
        return power and after.kind == "sign" and after.text == "^"

    def starts_factor(self) -> bool:
        token = self.next
        if token.kind in ("number", "name", "letter"):
            return token.text not in ("rfloor", "rceil", "over", "choose")
        return token.kind == "sign" and (
            token.text in ("(", "[", "{") or (token.text == "|" and not self.bars)
        )

    def factor(self) -> Expression:
        return self.mixed_number() or self.power()

    def mixed_number(self) -> Number | None:
        r"""`7 3/4` and `7\frac{3}{4}`: a whole number and a proper fraction."""
        start, whole = self.position, self.next
        if whole.kind != "number" or not whole.text.isdigit() or whole.value is None:
            return None
        self.take()
        part: Fraction | None = None
        if self.next.kind == "name" and self.next.text == "frac":
            part = _proper_fraction(self.power())
        else:
            ahead = self.tokens[self.position : self.position + 3]
            if [t.kind for t in ahead] == ["number", "sign", "number"] and ahead[1].text == "/":
                over, under = ahead[0].value, ahead[2].value
                assert over is not None and under is not None
                part = _proper(over, under)
                self.position += 3
        if part is None:
            self.position = start
            return None
        return Number(whole.value + part)

    def power(self) -> Expression:
        """postfix ('^' exponent)?, from the right; a degree is pi/180."""
        value = self.postfix(self.nested(self.atom))
        if not self.accept("^"):
            return value
        if self.degree_sign():
            return self.node("*", value, _DEGREE)
        exponent = self.signed(lambda: self.nested(self.power))
        return self.postfix(self.node("^", value, exponent))

    def degree_sign(self) -> bool:
        r"""Take the `\circ` or `{\circ}` of `90^\circ`."""
        ahead = [token.text for token in self.tokens[self.position : self.position + 3]]
        signs = 1 if ahead[0] == "circ" else 3 if ahead == ["{", "circ", "}"] else 0
        self.position += signs
        return signs > 0

    def postfix(self, value: Expression) -> Expression:
        while self.accept("'"):
            if not isinstance(value, Symbol):
                raise Unreadable("a prime after something that is no symbol")
            value = Symbol(value.name + "'")
        if self.accept("!"):
            value = self.node("!", value)
            if self.next.text == "!":
                raise Unreadable("a double factorial")
        return value

    def atom(self) -> Expression:
        token = self.take()
        if token.kind == "number" and token.value is not None:
            return self.repeating(token) or Number(token.value)
        if token.kind == "letter":
            symbol = Symbol(token.text + self.subscript())
            if token.text in _FUNCTION_LETTERS and self.next.text == "(" and not self.next.spaced:
                self.take()
                return self.node("apply", symbol, self.bracketed("("))
            return symbol
        if token.kind == "name":
            return self.named(token.text)
        if token.kind == "sign" and token.text in _CLOSING:
            return self.bracketed(token.text)
        raise Unreadable("no value where one is needed")

    def repeating(self, token: Token) -> Number | None:
        r"""The number in front of the repeating digits of `0.1\overline{6}`."""
        if self.next.kind != "name" or self.next.text not in ("overline", "bar", "dot"):
            return None
        self.take()
        self.expect("{")
        digits = self.take()
        self.expect("}")
        if "." not in token.text or not digits.text.isdigit() or token.value is None:
            raise Unreadable("a line over something that does not repeat")
        places = len(token.text.partition(".")[2])
        period = Fraction(int(digits.text), 10 ** len(digits.text) - 1)
        return Number(token.value + period / 10**places)

    def subscript(self) -> str:
        return "_" + self.spelled() if self.accept("_") else ""

    def spelled(self) -> str:
        """The next token, or the tokens of the next braces, as a name."""
        if not self.accept("{"):
            return self.take().text
        name = []
        while not self.accept("}"):
            token = self.take()
            if token.kind == "end" or token.text in "{}":
                raise Unreadable("a name that does not end")
            name.append(token.text)
        return "".join(name)

    def corners(self) -> str:
        r"""The letters of `\angle ABC`."""
        name = self.spelled()
        while len(name) < _MOST_CORNERS and self.next.kind == "letter":
            name += self.take().text
        return name

    def bracketed(self, opening: str) -> Expression:
        bars, self.bars = self.bars, int(opening == "|")
        value = self.group()
        self.expect(_CLOSING[opening])
        self.bars = bars
        return self.node("abs", value) if opening == "|" else value

    def argument(self) -> Expression:
        r"""What a command takes: `{...}`, or the single next token (`\frac12`, `\frac1{72}`)."""
        token = self.next
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            if token.value != int(token.text):
                raise Unreadable("a power of ten where one digit is taken")
            self.tokens[self.position : self.position + 1] = [
                Token("number", digits, value=Fraction(int(digits)))
                for digits in (token.text[0], token.text[1:])
            ]
        return self.nested(self.atom)

    def named(self, name: str) -> Expression:
        if name == "frac":
            if [t.text for t in self.tokens[self.position : self.position + 2]] == ["{", "d"]:
                raise Unreadable("a derivative, maybe")
            over = self.argument()
            return self.node("*", over, self.node("inv", self.argument()))
        if name == "binom":
            over = self.argument()
            return self.node("binom", over, self.argument())
        if name == "sqrt":
            if self.accept("["):
                index = self.nested(self.sum)
                self.expect("]")
                return self.node("root", self.argument(), index)
            return self.node("sqrt", self.nested(self.atom))
        if name in ("lfloor", "lceil"):
            value = self.nested(self.sum)
            if self.take().text != "r" + name[1:]:
                raise Unreadable("a floor or ceiling that does not close")
            return self.node(name[1:], value)
        if name in ("angle", "triangle"):
            return Symbol(f"{name} {self.corners()}")
        if name in _DECORATIONS:
            return Symbol(f"{name} {self.spelled()}")
        if name in FUNCTIONS:
            return self.function(name)
        if name in CONSTANTS or name in GREEK:
            return Symbol(name + self.subscript())
        raise Unreadable("a command this reader does not know")

    def function(self, name: str) -> Expression:
        r"""`\sin x`, `\sin^2 x`, `\log_2 8`, `sin(x)`: the argument ends before + and -."""
        base = self.argument() if self.accept("_") else None
        exponent: Expression | None = None
        if self.accept("^"):
            exponent = self.signed(lambda: self.nested(self.power))
        inverse = exponent in _MINUS_ONE
        if inverse:
            if name not in ("sin", "cos", "tan"):
                raise Unreadable("a minus first power of a function means two things")
            name = "arc" + name
        if base is not None and name != "log":
            raise Unreadable("a subscript of a function")
        value = self.nested(self.function_argument)
        operands = (value,) if base is None else (value, base)
        result = self.node("log" if name == "lg" else name, *operands)
        return result if exponent is None or inverse else self.node("^", result, exponent)

    def function_argument(self) -> Expression:
        if self.next.kind == "sign" and self.next.text in ("(", "{", "|", "["):
            return self.power()
        negative = self.accept("-")
        factors = [self.power()]
        while self.starts_factor() and self.next.text not in FUNCTIONS | {"("}:
            factors.append(self.power())
        if self.accept("/"):
            factors.append(self.node("inv", self.power()))
        value = factors[0] if len(factors) == 1 else self.node("*", *factors)
        return self.node("neg", value) if negative else value


_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
_ONE = Number(Fraction(1))
_DEGREE = Operation("*", (Symbol("pi"), Number(Fraction(1, 180))))
_MINUS_ONE = (Number(Fraction(-1)), Operation("neg", (_ONE,)))


def _proper_fraction(tree: Expression) -> Fraction | None:
    """The value of a literal fraction of whole numbers, from 0 up to 1; None for anything else."""
    match tree:
        case Operation("*", (Number(over), Operation("inv", (Number(under),)))):
            return _proper(over, under)
    return None


def _proper(over: Fraction, under: Fraction) -> Fraction | None:
    whole = over.denominator == under.denominator == 1
    return over / under if whole and 0 <= over < under else None
