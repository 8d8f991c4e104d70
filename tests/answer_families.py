r"""Families of generated answers, for the verifier's property tests.

Each strategy draws a gold answer, an equivalent spelling and an answer of another value (one
coefficient, sign, bracket, exponent or the order changed). Spellings are sympy's or our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import sympy
from hypothesis import strategies as st

X, Y = sympy.symbols("x y")

small = st.integers(-9, 9)
positive = st.integers(1, 9)
nonzero = small.filter(bool)
fractions = st.builds(Fraction, st.integers(-40, 40), st.integers(1, 12))
square_free = st.sampled_from([2, 3, 5, 6, 7, 10, 11, 13])
shift = st.sampled_from([-2, -1, 1, 2])


@dataclass(frozen=True)
class Trio:
    """A gold answer, an equivalent answer and one that is not."""

    gold: str
    same: str
    other: str


# spellings


@st.composite
def styled(draw, latex: str) -> str:
    """The same mathematics as another hand would type it."""
    for change in draw(st.lists(st.sampled_from(STYLES), max_size=3, unique=True)):
        latex = change(latex)
    return latex


STYLES: tuple[Callable[[str], str], ...] = (
    lambda text: text.replace(r"\frac", r"\dfrac"),
    lambda text: text.replace(r"\frac", r"\tfrac"),
    lambda text: text.replace("-", "\u2212"),
    lambda text: text.replace(r"\left", "").replace(r"\right", ""),
    lambda text: text.replace(" + ", "+").replace(" - ", "-"),
    lambda text: text.replace(" + ", r" \, + \, "),
    lambda text: text.replace(r"\pi", "\u03c0"),
    lambda text: re.sub(r"\^\{(\d)\}", r"^\1", text),
    lambda text: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", text),
    lambda text: re.sub(r"\^\{2\}", "\u00b2", text),
    lambda text: rf"\displaystyle {text}",
    lambda text: f"${text}$",
    lambda text: f" {text}. ",
)


def sign_of(number: int) -> str:
    return "-" if number < 0 else "+"


def plain(value: Fraction) -> str:
    return str(value)


def latex_fraction(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def minus_inside(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def mixed(value: Fraction) -> str:
    whole, part = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    if not part:
        return plain(value)
    return rf"{sign}{whole}\frac{{{part.numerator}}}{{{part.denominator}}}"


def decimal(value: Fraction) -> str:
    """With a repeating part where there is one."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    whole, rest = divmod(value, 1)
    digits, seen = "", {}
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(rest * 10, 1)
        digits += str(digit)
    if rest:
        place = seen[rest]
        return rf"{sign}{whole}.{digits[:place]}\overline{{{digits[place:]}}}"
    return f"{sign}{whole}.{digits or 0}"


SPELLINGS = (plain, latex_fraction, minus_inside, mixed, decimal)


# numbers


@st.composite
def rational_numbers(draw) -> Trio:
    value = draw(fractions)
    moved = value + Fraction(draw(shift), draw(st.sampled_from([1, 10, 1000, 10**9])))
    other = draw(st.sampled_from([moved, -value if value else moved]))
    gold, same, wrong = (
        draw(st.sampled_from(SPELLINGS))(number) for number in (value, value, other)
    )
    return Trio(gold, draw(styled(same)), wrong)


@st.composite
def radicals(draw) -> Trio:
    """a + b sqrt(n), rationalised from (a^2 - b^2 n) / (a - b sqrt(n))."""
    a, b, n, k = draw(nonzero), draw(nonzero), draw(square_free), draw(st.integers(2, 5))
    value = a + b * sympy.sqrt(n)
    sign = sign_of(b)
    same = draw(
        st.sampled_from(
            [
                rf"\frac{{{a * a - b * b * n}}}{{{a} {sign_of(-b)} {abs(b)}\sqrt{{{n}}}}}",
                rf"{a} {sign} \sqrt{{{b * b * n}}}",
                rf"{b}\sqrt{{{n}}} {sign_of(a)} {abs(a)}",
                rf"\frac{{{a * k} {sign} {abs(b)}\sqrt{{{n * k * k}}}}}{{{k}}}",
            ]
        )
    )
    other = draw(
        st.sampled_from(
            [
                a - b * sympy.sqrt(n),
                -value,
                a + b * sympy.sqrt(n + 1),
                value + sympy.Rational(draw(shift), 10**15),
                a + b * sympy.root(n, 3),
            ]
        )
    )
    return Trio(sympy.latex(value), draw(styled(same)), sympy.latex(other))


@st.composite
def nested_radicals(draw) -> Trio:
    r"""sqrt(m) + sqrt(n) is sqrt(m + n + 2 sqrt(mn))."""
    m, n = draw(st.integers(2, 30)), draw(st.integers(2, 30))
    same = rf"\sqrt{{{m + n} + 2\sqrt{{{m * n}}}}}"
    other = rf"\sqrt{{{m + n} {draw(st.sampled_from(['-', '+ 1 +']))} 2\sqrt{{{m * n}}}}}"
    return Trio(rf"\sqrt{{{m}}} + \sqrt{{{n}}}", draw(styled(same)), other)


@st.composite
def complex_numbers(draw) -> Trio:
    a, b, c, d = (draw(nonzero) for _ in range(4))
    value = sympy.expand((a + b * sympy.I) * (c + d * sympy.I))
    real, imaginary = value.as_real_imag()
    same = draw(
        st.sampled_from(
            [
                rf"({a} {sign_of(b)} {abs(b)}i)({c} {sign_of(d)} {abs(d)}i)",
                f"{imaginary}i {sign_of(real)} {abs(real)}",
                rf"\frac{{{-imaginary} {sign_of(real)} {abs(real)}i}}{{i}}",
            ]
        )
    )
    other = draw(
        st.sampled_from(
            [value + draw(shift), value + draw(shift) * sympy.I, -value]
            + [sympy.conjugate(value)] * bool(imaginary)
        ).filter(lambda number: number != value)
    )
    return Trio(sympy.latex(value), draw(styled(same)), sympy.latex(other))


# expressions with variables


@st.composite
def polynomials(draw) -> Trio:
    factors = [
        draw(nonzero) * X + draw(small) * draw(st.sampled_from([1, Y, X * Y])) + draw(small)
        for _ in range(draw(st.integers(1, 3)))
    ]
    product = sympy.Mul(*factors, evaluate=False)
    expanded = sympy.expand(product)
    other = draw(
        st.sampled_from(
            [
                expanded + draw(shift),
                expanded + draw(shift) * X,
                expanded * 2,
                -expanded,
                expanded.subs(X, -X - 1),
                expanded + sympy.Rational(1, 10**12) * X**2,
            ]
        ).filter(lambda tree: sympy.expand(tree - expanded) != 0)
    )
    dot = draw(st.sampled_from([None, "dot", "times"]))
    same = draw(st.sampled_from([product, sympy.factor(expanded), expanded]))
    order = draw(st.sampled_from(["lex", "rev-lex", "grlex"]))
    return Trio(
        sympy.latex(expanded),
        draw(styled(sympy.latex(same, mul_symbol=dot, order=order))),
        sympy.latex(other),
    )


@st.composite
def quotients(draw) -> Trio:
    """A sum of partial fractions against one fraction."""
    a, b, c, d = draw(nonzero), draw(nonzero), draw(small), draw(small)
    total = a / (X - c) + b / (Y - d)
    other = draw(
        st.sampled_from(
            [a / (X - c) - b / (Y - d), total + draw(shift), 1 / total, a / (X - c) + b / (X - d)]
        )
    )
    same = draw(styled(sympy.latex(sympy.together(total))))
    return Trio(sympy.latex(total), same, sympy.latex(other))


@st.composite
def functions(draw) -> Trio:
    r"""Identities of sines, exponentials and logarithms, scaled."""
    a, k, n = draw(st.integers(2, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 9))
    gold, same, other = draw(
        st.sampled_from(
            [
                (rf"{a}\sin {2 * k}x", rf"{2 * a}\sin({k}x)\cos({k}x)", rf"{a}\sin({k}x)"),
                (rf"{a}\cos {2 * k}x", rf"{a}-{2 * a}\sin^2({k}x)", rf"{a}-{2 * a}\cos^2({k}x)"),
                (rf"\tan({k}x)", rf"\frac{{\sin({k}x)}}{{\cos({k}x)}}", rf"\cot({k}x)"),
                (rf"e^{{{a + k}}}x", rf"xe^{{{a}}}\cdot e^{{{k}}}", rf"xe^{{{a * k + 1}}}"),
                (rf"{a}e^{{{k}x}}", rf"{a}(e^{{x}})^{{{k}}}", rf"{a}e^{{x^{{{k}}}}}"),
                (rf"\ln {a * n}", rf"\ln {a} + \ln {n}", rf"\ln {a} \cdot \ln {n}"),
                (rf"{k}\ln {a}", rf"\ln {a**k}", rf"\ln {a * k + 100}"),
                (rf"\log_{{{a}}} {n + 20}", rf"\frac{{\ln {n + 20}}}{{\ln {a}}}", r"\log_{11} 10"),
                (rf"\cos\frac{{\pi}}{{{2 * k}}}", rf"\sin\frac{{{k - 1}\pi}}{{{2 * k}}}", "0.9"),
            ]
        )
    )
    return Trio(gold, draw(styled(same)), other)


@st.composite
def equations(draw) -> Trio:
    """ax + by = c against its multiples, solved for y, and neighbours."""
    a, b, c, k = (draw(nonzero) for _ in range(4))
    gold = rf"{sympy.latex(a * X + b * Y)} = {c}"
    slope, start = Fraction(-a, b), Fraction(c, b)
    same = draw(
        st.sampled_from(
            [
                rf"{sympy.latex(k * (a * X + b * Y))} = {k * c}",
                rf"{sympy.latex(a * X + b * Y - c)} = 0",
                rf"{c} = {sympy.latex(a * X + b * Y)}",
                rf"y = {latex_fraction(slope)}x + {minus_inside(start)}",
            ]
        )
    )
    other = draw(
        st.sampled_from(
            [
                rf"{sympy.latex(a * X + b * Y)} = {c + draw(shift)}",
                rf"{sympy.latex(a * X - b * Y)} = {c}",
                rf"{sympy.latex((a * X + b * Y) * X)} = {c}",
                rf"{sympy.latex(a * X + b * Y)} < {c}",
                rf"{sympy.latex(a * X + b * Y)}",
            ]
        )
    )
    return Trio(gold, draw(styled(same)), other)


@st.composite
def inequalities(draw) -> Trio:
    r"""Two variables; a negative factor turns the sign."""
    a, b, c, k = draw(nonzero), draw(nonzero), draw(small), draw(positive)
    sign = draw(st.sampled_from(["<", ">", r"\le", r"\geq"]))
    turned = {"<": ">", ">": "<", r"\le": r"\ge", r"\geq": r"\leq"}[sign]
    strict = {"<": r"\le", ">": r"\ge", r"\le": "<", r"\geq": ">"}[sign]
    left, negative = sympy.latex(a * X + b * Y), sympy.latex(-k * (a * X + b * Y))
    same = draw(st.sampled_from([f"{negative} {turned} {-k * c}", f"{c} {turned} {left}"]))
    others = f"{left} {turned} {c}", f"{left} {strict} {c}", f"{negative} {sign} {-k * c}"
    other = draw(st.sampled_from(others))
    return Trio(f"{left} {sign} {c}", draw(styled(same)), other)


# collections


def interval(brackets: str, low: str, high: str) -> str:
    return rf"\left{brackets[0]}{low}, {high}\right{brackets[1]}"


@st.composite
def intervals(draw) -> Trio:
    low = draw(fractions)
    ends = low, low + draw(st.integers(1, 9))
    brackets, wrong = draw(
        st.lists(st.sampled_from(["()", "[]", "(]", "[)"]), min_size=2, max_size=2, unique=True)
    )
    gold = interval(brackets, *map(latex_fraction, ends))
    signs = {"(": "<", "[": r"\le", ")": "<", "]": r"\le"}
    low_sign, high_sign = (signs[bracket] for bracket in brackets)
    same = draw(
        st.sampled_from(
            [
                interval(brackets, *map(decimal, ends)),
                f"{brackets[0]}{plain(ends[0])},{plain(ends[1])}{brackets[1]}",
                f"{plain(ends[0])} {low_sign} x {high_sign} {plain(ends[1])}",
                rf"x \in {gold}",
            ]
        )
    )
    other = draw(
        st.sampled_from(
            [
                interval(wrong, *map(latex_fraction, ends)),
                interval(brackets, plain(ends[0]), plain(ends[1] + 1)),
                interval(brackets, plain(-ends[1]), plain(-ends[0] + 1)),
                rf"\left\{{{plain(ends[0])}, {plain(ends[1])}\right\}}",
            ]
        )
    )
    return Trio(gold, draw(styled(same)), other)


@st.composite
def unions(draw) -> Trio:
    a, b, c, d = sorted(draw(st.lists(small, min_size=4, max_size=4, unique=True)))
    first, second, changed = (draw(st.sampled_from(["()", "[]", "(]", "[)"])) for _ in range(3))
    one, two = interval(first, str(a), str(b)), interval(second, str(c), str(d))
    wrong = interval(changed, str(a), str(b))
    other = draw(
        st.sampled_from(
            [rf"{one} \cap {two}", one, rf"{one} \cup {interval(second, str(c), str(d + 1))}"]
            + [rf"{wrong} \cup {two}"] * (changed != first)
        )
    )
    return Trio(rf"{one} \cup {two}", draw(styled(rf"{two} \cup {one}")), other)


@st.composite
def finite_sets(draw) -> Trio:
    items = draw(st.lists(fractions, min_size=2, max_size=5, unique=True))
    shuffled = draw(st.permutations(items))
    changed = [items[0] + 41 * draw(shift), *items[1:]]
    other = draw(
        st.sampled_from(
            [
                braces(map(plain, changed)),
                braces(map(plain, items[1:])),
                braces(map(plain, [*items, items[0] + 100])),
                f"({', '.join(map(plain, items))})",
                f"[{', '.join(map(plain, items))}]",
            ]
        )
    )
    spell = draw(st.sampled_from(SPELLINGS))
    return Trio(
        braces(map(latex_fraction, items)), draw(styled(braces(map(spell, shuffled)))), other
    )


def braces(items) -> str:
    return rf"\left\{{{', '.join(items)}\right\}}"


@st.composite
def tuples(draw) -> Trio:
    items = draw(st.lists(fractions, min_size=2, max_size=4, unique=True))
    changed = [*items[:-1], items[-1] + draw(shift)]
    other = draw(
        st.sampled_from(
            [
                f"({', '.join(map(plain, items[::-1]))})",
                f"({', '.join(map(plain, changed))})",
                f"({', '.join(map(plain, [*items, items[0]]))})",
                braces(map(plain, items)),
                f"({plain(items[0])}, ({', '.join(map(plain, items[1:]))}, 0))",
            ]
        )
    )
    spell = draw(st.sampled_from(SPELLINGS))
    same = rf"\left({', '.join(map(spell, items))}\right)"
    return Trio(f"({', '.join(map(latex_fraction, items))})", draw(styled(same)), other)


@st.composite
def ratios(draw) -> Trio:
    a, k = draw(positive), draw(positive)
    rest = draw(st.lists(st.integers(0, 9), min_size=1, max_size=2))
    changed = [*rest[:-1], rest[-1] + draw(positive)]
    gold, same, other = (
        ":".join(str(factor * item) for item in (a, *items))
        for factor, items in ((1, rest), (k, rest), (1, changed))
    )
    return Trio(gold, draw(styled(same)), other)


@st.composite
def matrices(draw) -> Trio:
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    numbers = [[draw(fractions) for _ in range(columns)] for _ in range(rows)]
    row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    changed = [list(line) for line in numbers]
    changed[row][column] += draw(shift)
    transposed = [list(line) for line in zip(*numbers, strict=True)]
    others = [changed, numbers + numbers[:1]] + [transposed] * (transposed != numbers)
    environment = draw(st.sampled_from(["pmatrix", "bmatrix"]))
    return Trio(
        matrix("pmatrix", latex_fraction, numbers),
        draw(styled(matrix(environment, draw(st.sampled_from(SPELLINGS)), numbers))),
        matrix("pmatrix", plain, draw(st.sampled_from(others))),
    )


def matrix(environment: str, spell: Callable[[Fraction], str], numbers: list) -> str:
    lines = r" \\ ".join(" & ".join(map(spell, line)) for line in numbers)
    return rf"\begin{{{environment}}} {lines} \end{{{environment}}}"


FAMILIES = {
    "rationals": rational_numbers,
    "radicals": radicals,
    "nested radicals": nested_radicals,
    "complex numbers": complex_numbers,
    "polynomials": polynomials,
    "quotients": quotients,
    "functions": functions,
    "equations": equations,
    "inequalities": inequalities,
    "intervals": intervals,
    "unions": unions,
    "finite sets": finite_sets,
    "tuples": tuples,
    "ratios": ratios,
    "matrices": matrices,
}
