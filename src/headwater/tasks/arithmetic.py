"""The embedded task: chains of operations modulo a small number, applied from left to right.

A problem is a sheet with a blank after every step: modulo 10, `7+5=?*3=?-4=?` is worked as
`7+5=2*3=6-4=2`, then `\\boxed{2}`. Sheets of one source are equally long (dots fill up shorter
ones), so that a very small model can learn to read them. Difficulty is graded by the number of
steps. Everything is drawn from a seed; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headwater import seeding
from headwater.errors import InputError
from headwater.near_names import near
from headwater.tasks.problems import LabelledProblems
from headwater.types import Label, Problem

_OPTIONS = {
    "steps": "3-5",
    "count": "2000",
    "seed": "0",
    "operations": "+-*",
    "modulus": "10",
}

Quality = Literal["worked", "careless", "guessed"]


@dataclass(frozen=True, slots=True)
class ArithmeticOptions:
    """Checked options of a `task:arithmetic` source."""

    steps: tuple[int, int]
    count: int
    seed: int
    operations: str
    modulus: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and the operations applied to it, left to right, modulo `modulus`.

    `room` is the number of steps the sheet has place for.
    """

    start: int
    operations: tuple[tuple[str, int], ...]
    modulus: int
    room: int

    @property
    def text(self) -> str:
        """The sheet as the prompt shows it."""
        sheet = "".join(f"{op}{operand}=?" for op, operand in self.operations)
        return f"{self.start}{sheet}{'....' * (self.room - len(self.operations))}"

    @property
    def answer(self) -> int:
        """The value of the whole chain."""
        value = self.start
        for op, operand in self.operations:
            value = apply(value, op, operand, self.modulus)
        return value


def apply(value: int, operation: str, operand: int, modulus: int) -> int:
    """One step.

    >>> apply(7, "*", 3, 10), apply(2, "-", 5, 10)
    (1, 7)
    """
    if operation == "+":
        return (value + operand) % modulus
    if operation == "-":
        return (value - operand) % modulus
    return (value * operand) % modulus


def draw_chain(rng: np.random.Generator, options: ArithmeticOptions) -> Chain:
    """A random chain; operands are 2 to 9, the start is below the modulus."""
    low, high = options.steps
    symbols = options.operations
    drawn = tuple(
        (symbols[int(rng.integers(len(symbols)))], int(rng.integers(2, 10)))
        for _ in range(int(rng.integers(low, high + 1)))
    )
    return Chain(int(rng.integers(options.modulus)), drawn, options.modulus, high)


def trace(chain: Chain, quality: Quality, rng: np.random.Generator, slip_rate: float = 0.0) -> str:
    """A response to the chain's prompt.

    worked: every step right. careless: each step is wrong with probability `slip_rate` and the
    rest follows from it. guessed: a random value without any work.
    """
    if quality == "guessed":
        return f"\\boxed{{{int(rng.integers(chain.modulus))}}}"
    value, work = chain.start, str(chain.start)
    for op, operand in chain.operations:
        value = apply(value, op, operand, chain.modulus)
        if quality == "careless" and rng.random() < slip_rate:
            value = (value + int(rng.integers(1, chain.modulus))) % chain.modulus
        work += f"{op}{operand}={value}"
    return f"{work}\n\\boxed{{{value}}}"


def draw_quality(rng: np.random.Generator, worked: float, careless: float) -> Quality:
    """A trace's quality with the given shares; the rest is guessed."""
    u = rng.random()
    if u < worked:
        return "worked"
    return "careless" if u < worked + careless else "guessed"


def load(options: Mapping[str, str]) -> LabelledProblems:
    """`task:arithmetic?steps=3-5&count=2000&seed=0&operations=+-*&modulus=10` as problems.

    They are distinct. Raises InputError for an unknown option or a value out of range.
    """
    settings = parse_options(options)
    rng = seeding.generator(
        settings.seed, "arithmetic", *settings.steps, settings.operations, settings.modulus
    )
    chains: dict[str, Chain] = {}
    for _ in range(settings.count * 50):
        if len(chains) == settings.count:
            break
        chain = draw_chain(rng, settings)
        chains.setdefault(chain.text, chain)
    if len(chains) < settings.count:
        raise InputError(
            f"task:arithmetic: count={settings.count} but only {len(chains)} distinct problems "
            "were found; lower count or allow more steps"
        )
    low, high = settings.steps
    source = f"arithmetic/{low}-{high}"
    problems, labels = [], []
    for text, chain in chains.items():
        problem_id = f"arithmetic-{text}"
        problems.append(Problem(problem_id, text, source, level=len(chain.operations)))
        labels.append(Label(problem_id, str(chain.answer), trace(chain, "worked", rng)))
    return LabelledProblems.of(problems, labels)


def parse_options(options: Mapping[str, str]) -> ArithmeticOptions:
    """Options with defaults filled in. Raises InputError naming the option and the cure."""
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise InputError(
            f"task:arithmetic: unknown option {unknown[0]!r}; choose from {', '.join(_OPTIONS)}"
            f"{near(unknown[0], _OPTIONS)}"
        )
    merged = {**_OPTIONS, **options}
    low, _, high = merged["steps"].partition("-")
    try:
        steps = (int(low), int(high or low))
        count, seed, modulus = (int(merged[name]) for name in ("count", "seed", "modulus"))
    except ValueError as error:
        raise InputError(f"task:arithmetic: {error}; steps is LOW-HIGH, others integers") from None
    if not 1 <= steps[0] <= steps[1] <= 20:
        raise InputError(
            f"task:arithmetic: steps={merged['steps']}; expected 1 <= LOW <= HIGH <= 20"
        )
    if count < 1:
        raise InputError(f"task:arithmetic: count={count}; expected at least 1")
    operations = "".join(dict.fromkeys(merged["operations"].replace(" ", "+")))
    if not operations or set(operations) - set("+-*"):
        raise InputError(
            f"task:arithmetic: operations={merged['operations']!r}; expected some of + - *"
        )
    if not 2 <= modulus <= 100:
        raise InputError(f"task:arithmetic: modulus={modulus}; expected 2 to 100")
    return ArithmeticOptions(steps, count, seed, operations, modulus)
