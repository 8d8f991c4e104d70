"""Completions to grade, made from a seed: common answers, ones that need algebra, hostile ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from headwater.tasks.problems import load_problems


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion, its gold answer, and whether it was made to be right."""

    completion: str
    gold: str = field(repr=False)
    right: bool


#: Gold answer, another spelling of it, and a wrong answer.
Spelled = tuple[str, str, str]
Random = random.Random


def common(count: int, rng: Random) -> list[Sample]:
    """Answers as GSM8K and MATH have them, in turn from both, every second one right."""
    samples = []
    for number in range(count):
        kinds = _GSM8K if number % 2 else _MATH
        samples.append(_sample(rng.choice(kinds)(rng), number // 2 % 2 == 0, rng))
    return samples


def of_problems(source: str, count: int, rng: Random) -> list[Sample]:
    """The gold answers of a problem file, every second one with another problem's as the answer."""
    golds = [label.answer for label in load_problems(source).labels]
    samples = []
    for number in range(count):
        gold = golds[number % len(golds)]
        other = rng.choice(golds)
        answer = gold if number % 2 == 0 else other
        samples.append(Sample(_completion(answer, rng), gold, answer == gold))
    return samples


def algebra(count: int, rng: Random) -> list[Sample]:
    """Equal by identities that only a computer algebra system knows; half of them are not equal."""
    return [_sample(rng.choice(_ALGEBRA)(rng), number % 2 == 0, rng) for number in range(count)]


def hostile(count: int, rng: Random) -> list[Sample]:
    """Well-formed answers that a computer algebra system works on for minutes or for ever."""
    samples = []
    for _ in range(count):
        terms, power = rng.randrange(10**7, 10**9), rng.randrange(2, 9)
        answer = rf"\sum_{{k=1}}^{{{terms}}} \frac{{1}}{{k^{power}}}"
        samples.append(Sample(_completion(answer, rng), str(rng.randrange(2, 99)), False))
    return samples


def mixed(ordinary: list[Sample], others: list[Sample], rng: Random) -> list[Sample]:
    """All of them in random order."""
    samples = ordinary + others
    rng.shuffle(samples)
    return samples


def _sample(spelled: Spelled, right: bool, rng: Random) -> Sample:
    gold, same, wrong = spelled
    answer = rng.choice((gold, same)) if right else wrong
    return Sample(_completion(answer, rng), gold, right)


def _completion(answer: str, rng: Random) -> str:
    steps = " ".join(
        f"Step {step}: ${(a := rng.randrange(2, 99))} + {(b := rng.randrange(2, 99))} = {a + b}$."
        for step in range(1, rng.randrange(3, 9))
    )
    return rf"{steps} The answer is $\boxed{{{answer}}}$."


def _count(rng: Random) -> Spelled:
    value = rng.randrange(2, 2_000)
    return str(value), rng.choice((f"{value}.0", f"{value} ", rf"\text{{{value}}}")), str(value + 1)


def _thousands(rng: Random) -> Spelled:
    value = rng.randrange(1_000, 900_000)
    return str(value), f"{value:,}", f"{value + 10:,}"


def _dollars(rng: Random) -> Spelled:
    value = rng.randrange(2, 900)
    return str(value), rf"\${value}.00", rf"\${value}.50"


def _measure(rng: Random) -> Spelled:
    value, unit = rng.randrange(2, 200), rng.choice(("miles", "hours", "apples", "cm"))
    return str(value), rf"{value}\text{{ {unit}}}", rf"{value * 2}\text{{ {unit}}}"


def _percent(rng: Random) -> Spelled:
    value = rng.randrange(2, 100)
    return str(value), rf"{value}\%", rf"{100 - value + (value == 50)}\%"


def _decimal(rng: Random) -> Spelled:
    value = rng.randrange(1, 4_000)
    return f"{value / 8:g}", rf"\frac{{{value}}}{{8}}", f"{value / 8 + 0.5:g}"


def _negative(rng: Random) -> Spelled:
    value = rng.randrange(2, 500)
    return f"-{value}", f"- {value}", str(value)


def _fraction(rng: Random) -> Spelled:
    over, under = rng.randrange(1, 60), rng.randrange(2, 60)
    return (
        rf"\frac{{{over}}}{{{under}}}",
        rng.choice((f"{over}/{under}", rf"\dfrac{{{3 * over}}}{{{3 * under}}}")),
        rf"\frac{{{over + 1}}}{{{under}}}",
    )


def _root(rng: Random) -> Spelled:
    factor, inside = rng.randrange(2, 9), rng.choice((2, 3, 5, 7, 11))
    same = rng.choice((rf"\sqrt{{{factor**2 * inside}}}", rf"{factor} \sqrt {inside}"))
    return rf"{factor}\sqrt{{{inside}}}", same, rf"{factor}\sqrt{{{inside + 1}}}"


def _circle(rng: Random) -> Spelled:
    over, under = rng.randrange(1, 30), rng.randrange(2, 12)
    gold = rf"\frac{{{over}\pi}}{{{under}}}"
    return gold, rf"\frac{{{over}}}{{{under}}}\pi", rf"\frac{{{over}}}{{{under}}}"


def _point(rng: Random) -> Spelled:
    x, y = rng.randrange(-20, 20), rng.randrange(1, 20)
    gold = rf"\left( {x}, \frac{{{y}}}{{2}} \right)"
    return gold, f"({x},{y / 2:g})", f"({x},{y / 2 + 1:g})"


def _interval(rng: Random) -> Spelled:
    low, high = rng.randrange(-20, 0), rng.randrange(1, 20)
    return rf"[{low}, {high})", rf"\left[{low},{high}\right)", rf"({low}, {high})"


def _polynomial(rng: Random) -> Spelled:
    a, b = rng.randrange(2, 12), rng.randrange(2, 12)
    return f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"x^2+{a + b}x-{a * b}"


def _solutions(rng: Random) -> Spelled:
    a, b = rng.randrange(-30, 0), rng.randrange(0, 30)
    return f"{a},{b}", rng.choice((f"{b}, {a}", rf"\{{{a}, {b}\}}")), f"{a},{b + 1}"


def _matrix(rng: Random) -> Spelled:
    a, b, c = (rng.randrange(-9, 10) for _ in range(3))
    rows = rf"{a} & {b} \\ {c} & 1"
    return (
        rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}",
        rf"\begin{{pmatrix}}{rows.replace(' ', '')}\end{{pmatrix}}",
        rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 2 \end{{pmatrix}}",
    )


def _words(rng: Random) -> Spelled:
    gold, wrong = rng.sample(("Evelyn", "Tuesday", "even", "ellipse", "Navin"), 2)
    return rf"\text{{{gold}}}", gold, rf"\text{{{wrong}}}"


def _equation(rng: Random) -> Spelled:
    a, b = rng.randrange(2, 9), rng.randrange(2, 20)
    return f"y = {a}x + {b}", f"y={b}+{a}x", f"y = {a}x - {b}"


_GSM8K: tuple[Callable[[Random], Spelled], ...] = (
    _count, _count, _count, _thousands, _dollars, _measure, _percent, _decimal,
)  # fmt: skip
_MATH: tuple[Callable[[Random], Spelled], ...] = (
    _count, _negative, _fraction, _root, _circle, _point, _interval, _polynomial, _solutions,
    _matrix, _words, _equation,
)  # fmt: skip


def _double_angle(rng: Random) -> Spelled:
    a = rng.randrange(2, 9)
    gold = rf"\sin({2 * a}x)"
    return gold, rf"2\sin({a}x)\cos({a}x)", rf"\sin({a}x)\cos({a}x)"


def _pythagoras(rng: Random) -> Spelled:
    a, b = rng.randrange(2, 9), rng.randrange(2, 9)
    gold = f"{a}x+{b}"
    identity = rf"{a}x+{b}\sin^2({a}x)+{b}\cos^2({a}x)"
    return gold, identity, rf"{a}x+\sin^2({a}x)+{b}\cos^2({a}x)"


def _logarithms(rng: Random) -> Spelled:
    a, b = rng.randrange(2, 6), rng.randrange(2, 9)
    return rf"{a}\ln {b} + x^2", rf"\ln({b**a}) + x^2", rf"\ln({b**a}) + x"


def _integral(rng: Random) -> Spelled:
    high, power = rng.randrange(2, 9), rng.randrange(1, 5)
    gold = rf"\frac{{{high ** (power + 1)}}}{{{power + 1}}}"
    integral = rf"\int_0^{high} x^{power} dx"
    return integral, gold, rf"\frac{{{high ** (power + 1) + 1}}}{{{power + 1}}}"


_ALGEBRA: tuple[Callable[[Random], Spelled], ...] = (
    _double_angle, _pythagoras, _logarithms, _integral,
)  # fmt: skip
