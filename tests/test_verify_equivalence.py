"""Which answers equal which gold answers; the verifier's corpus. Every bug adds a row."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.types import Verdict
from headwater.verify.algebra import settle
from headwater.verify.equivalence import compare, compare_at_sight

EQUAL = [
    # numbers
    ("7", "7"), ("007", "7"), ("-0", "0"), ("+7", "7"), (".4", "0.4"), ("5", "5.0"), ("7.", "7"),
    ("1,234,567", "1234567"), ("32,\\! 349", "32349"), ("10{,}000", "10000"), ("1 000", "1000"),
    ("$1,000.99$", "1000.99"), ("1.5e3", "1500"), (r"1.5\times 10^3", "1500"), ("10^6", "1000000"),
    ("2 million", "2000000"), ("two", "2"), ("10!", "3628800"), (r"\binom{5}{2}", "10"),
    # fractions
    ("1/2", "0.5"), (r"\frac12", "1/2"), (r"\frac{1}2", "0.5"), (r"\frac1{72}", r"\frac{1}{72}"),
    ("½", r"\frac{1}{2}"), ("4/8", "1/2"), ("7 3/4", "31/4"), (r"918\frac{1}{2}", "918.5"),
    (r"-1\frac12", "-1.5"), ("3½", "7/2"), (r"0.1\overline{6}", "1/6"), (r"0.\overline{3}", "1/3"),
    (r"\frac{-a}{3}", r"-\frac{a}{3}"),
    # roots, constants, functions
    ("√2", r"\sqrt{2}"), (r"2\sqrt{2}", r"\sqrt{8}"), (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}{3}"),
    (r"\sqrt[3]{8}", "2"), ("2π", r"2\pi"), (r"\frac94\pi", r"\frac{9\pi}{4}"), ("3³", "27"),
    (r"\frac{\sqrt6+\sqrt2}{4}", r"\sin 75^\circ"), (r"e^{i\pi}", "-1"), (r"\log_2 8", "3"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\frac{\sqrt{3}}{3} \approx 0.577", r"\frac{\sqrt3}{3}"),
    (r"i^2", "-1"), ("5-2i", "-2i+5"), (r"\sqrt{x^2}", "|x|"), (r"\sin^2 x+\cos^2 x", "1"),
    (r"2\sin b\cos a", r"2\cos a \sin b"), (r"(x+1)^{\frac14}", r"\sqrt[4]{x+1}"),
    (r"2^{2008}-2", "-2+2^{2008}"),
    # polynomials
    ("x^2+2x+1", "(x+1)^2"), ("x²", "x^2"), ("x^2+2x+1", "x^2 + 2*x + 1"), ("x**2", "x^2"),
    (r"\frac{x+2}{7}", "x/7+2/7"), ("a b", "b a"),
    # what may stand around a number
    (r"\$10", "10"), ("100 dollars", r"\$100"), ("10%", "10"), ("50%", "0.5"), (r"44\%", "44"),
    (r"12\text{ cm}", "12"), ("12 cm", r"12 \text{ centimeters}"), ("90", r"90^\circ"),
    ("30 degrees", r"30^\circ"), ("864 square inches", r"864 \mbox{ inches}^2"), ("5 apples", "5"),
    (r"5.4 \text{ cents}", "5.4"), (r"2\sqrt5\text{ units}", r"2\sqrt{5}"),
    # labels and equations
    ("x = 5", "5"), ("5", "k=5"), ("11:21", "V_{1}:V_{2}=11:21"), ("(3,2)", "(p,q)=(3,2)"),
    (r"\frac{1}{\sqrt6}", r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}"), ("-2x", "y=-2x"),
    ("2x+y=0", "y=-2x"), ("x^2/16 + y^2/12 = 1/4", "x^2/4 + y^2/3 = 1"), ("f(2) = 7", "7"),
    # inequalities and intervals
    ("x <= 2", r"x \leq 2"), ("x != 5", r"x \neq 5"), ("3 < x", "x > 3"), ("(0,1)", "0<f(x)<1"),
    (r"[5,\infty)", r"x\ge 5"), (r"(-\infty, 3]", r"(-\infty,3]"), (r"x \in [1,2]", "[1,2]"),
    (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"), (r"\{x \mid x > 3\}", r"(3,\infty)"),
    (r"z \in [-\frac32,-1] \cup [1,\frac32]", r"1\leq|z|\leq\frac32"), ("2x > 4", "6 < 3x"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"\emptyset", r"\varnothing"),
    # lists, sets, tuples, matrices
    ("3, 2", "2, 3"), (r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", "2,1"), ("(1,4.5)", r"(1,\frac92)"),
    (r"1\pm\sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"), (r"19, 46, \text{ and } 82", "19, 46, and 82"),
    (r"p=-1 \text{ and } p=\dfrac{15}{8}", r"-1, \frac{15}8"), (r"\text{A,C}", "C, A"),
    (r"\left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right]",
     r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"), ("3:2", "6:4"),
    # bases, text, choices
    ("43_5", r"43_{5}"), (r"43_{\text{five}}", "43_5"), ("043_5", "43_5"),
    (r"\text{odd}", "odd"), ("Evelyn", r"\text{Evelyn}"), ("(C)", "C"), (r"\text{(C)}", "C"),
    (r"\text{no solution}", r"\text{No solution}"), ("f'", "f'"),
    # beyond expressions
    (r"\int_0^1 x dx", r"\frac{1}{2}"),
]  # fmt: skip
DIFFERENT = [
    ("-3", "3"), ("3.5", "3"), ("0.333333", "1/3"), ("22/7", r"\pi"), ("3.14159", r"\pi"),
    ("99999999999999999999", "100000000000000000000"), ("3³", "33"), ("5x", "5"), ("2a", "2"),
    (r"\frac12 x", "1/2"), ("x^2+1", "x^2-1"), (r"\sqrt{x^2}", "x"), (r"-\infty", r"\infty"),
    (r"\sqrt{1+10^{-200}}", "1"), ("e^{-1000}", "0"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"), (r"\sqrt{10^{40}+1}", "10^{20}"),
    # hedges, chains, words that change the meaning
    (r"11 \text{ or } 12", "12"), ("7 or 8", "7"), ("7 = 8", "8"), ("2+2=4", "4"), ("1 < 2", "2"),
    (r"7 \text{ is not the answer}", "7"), ("not 7", "7"), ("5 less", "5"), (r"3\pm 1", "4"),
    (r"5 \approx 7", "5"), ("5?", "5"), ("(5", "5"), (r"5\ldots", "5"), ("A or B", "A"),
    ("0", "a^2+b=0"), ("11a+c", "7=11a+c"), (r"\sin x = 1", "1"), ("x=3", "y=3"), ("2x=3", "3"),
    # kinds do not mix
    ("[0,1]", "(0,1)"), ("(1,2]", "[1,2]"), ("(1,2)", "(2,1)"), ("(1,2)", r"\{1,2\}"),
    ("1,2,3", "1,2"), ("1,1", "1"), ("x<3", r"x\le 3"), (r"x \leq 5", r"x \geq 5"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("17_{8}", "17"), ("43_5", "43_6"), (r"12\text{ m}", r"12\text{ cm}"), ("x=2,y=1", "1,2"),
    ("0", r"\emptyset"), ("god", "dog"), ("AZYUK2A", "2"), ("1", r"1\sqrt{19}"),
    (r"\sin 75", r"\sin 75^\circ"),
    # nothing there
    ("{}", "0"), (r"\text{}", "0"), ("-", "0"), ("^", "0"), (r"\frac", "0"), ("1/0", "0"),
    # hostile
    ("__import__('os').system('true')", "0"), ("lambda: 5", "5"), ("print(5)", "5"),
    ("8^{8^{8^{8}}}", "3"), ("(10^{8})!", "4"), ("1e99999", "0"), ("9" * 6000, "9" * 5999 + "8"),
    (r"\sqrt{" * 300 + "9" + "}" * 300, "9"), ("(" * 3000, "9"), ("100!!", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_are_correct(answer: str, gold: str) -> None:
    assert settle(answer, gold).startswith("correct:")


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_are_not_correct(answer: str, gold: str) -> None:
    assert not settle(answer, gold).startswith("correct:")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("8^{8^{8^{8}}}", Verdict.TIMEOUT),
        ("(10^{8})!", Verdict.TIMEOUT),
        ("(" * 3000 + "1", Verdict.UNPARSEABLE),
        ("x" * 60_000, Verdict.UNPARSEABLE),
        (r"\text{}", Verdict.UNPARSEABLE),
        ("4", Verdict.INCORRECT),
    ],
)
def test_limits_are_not_wrong_answers(answer: str, verdict: Verdict) -> None:
    finding = compare(answer, "3")
    assert finding.verdict is verdict


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("7", "8", False),
        ("1,000.50", "1000.5", True),
        ("9" * 6000, "0" + "9" * 6000, True),
        ("-3/6", r"\frac{-1}{2}", True),
        (r"\dfrac{2}{3}", "0.6666666667", False),
        (r"\left( 1,\,x \right)", "(1, x)", True),
        ("1/0", "2/0", None),
        (r"\sqrt{8}", r"2\sqrt2", None),
        ("x" * 2000, "x" * 2000, None),
        (r"\binom{10^{14000}}{1500}", "7", None),
        ("\u0300" * 20_000, "7", None),
    ],
)
def test_sight_decides_by_spelling_alone(answer: str, gold: str, equal: bool | None) -> None:
    started = time.perf_counter()
    finding = compare_at_sight(answer, gold)
    assert time.perf_counter() - started < 0.2
    assert (None if finding is None else finding.verdict is Verdict.CORRECT) == equal


def test_long_integers_are_compared_digit_by_digit() -> None:
    assert compare("9" * 6000, "0" + "9" * 6000).verdict is Verdict.CORRECT


def test_gold_may_be_a_worked_solution() -> None:
    gold = "We add. " * 40 + r"Final Answer: The final answer is $28 \%$. I hope it is correct."
    assert compare("28", gold).verdict is Verdict.CORRECT
    assert compare("4", r"two and two is \boxed{4}").verdict is Verdict.CORRECT


numbers = st.fractions(min_value=-1000, max_value=1000, max_denominator=60)


@given(numbers, numbers)
def test_rational_spellings_agree_with_arithmetic(one: Fraction, other: Fraction) -> None:
    latex = rf"\frac{{{one.numerator}}}{{{one.denominator}}}"
    plain = f"{other.numerator}/{other.denominator}"
    expected = Verdict.CORRECT if one == other else Verdict.INCORRECT
    assert compare(latex, plain).verdict is expected


coefficients = st.lists(st.integers(-9, 9), min_size=2, max_size=4)


def _polynomial(values: list[int]) -> str:
    return "+".join(f"({value})x^{{{power}}}" for power, value in enumerate(values))


@given(coefficients, st.integers(-9, 9), st.booleans())
def test_expanded_and_factored_polynomials(values: list[int], root: int, spoil: bool) -> None:
    product = [0, *values]
    for power, value in enumerate(values):
        product[power] -= root * value
    product[0] += spoil
    factored = f"(x-({root}))({_polynomial(values)})"
    expected = Verdict.INCORRECT if spoil else Verdict.CORRECT
    assert compare(factored, _polynomial(product)).verdict is expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(-1, 1))
def test_sums_of_roots_are_decided_exactly(a: int, b: int, off: int) -> None:
    squared = rf"\sqrt{{{a + b} + 2\sqrt{{{a * b}}}}}"
    shifted = rf"\sqrt{{{a}}} + \sqrt{{{b}}} + \frac{{{off}}}{{10^{{30}}}}"
    expected = Verdict.INCORRECT if off else Verdict.CORRECT
    assert compare(squared, shifted).verdict is expected


PIECES = [*"0123456789xyi+-*/^_(){}[]|!,.;:=<>$%&'\"\\ \n", r"\frac", r"\sqrt", r"\text{", r"\pm",
          r"\cup", r"\in", r"\le", r"\begin{pmatrix}", r"\end{pmatrix}", r"\{", r"\}", "½", "³",
          " or ", "^\\circ", "\\boxed{", "root ", r"\floor", r"\cos^2", r"\bar", "²", "\\approx",
          "10^{", "\ud800", "\x00"]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_no_text_breaks_the_comparison(answer: str) -> None:
    assert compare(answer, r"\frac{3}{7}").verdict in Verdict


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.integers(2, 400))
def test_repetition_stays_bounded(piece: str, times: int) -> None:
    assert compare(piece * times, r"(1, \sqrt{2})").verdict in Verdict
