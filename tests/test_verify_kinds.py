"""What makes two answers of a kind equal, rule by rule; the second table of a rule nearly is."""

import pytest

from headwater.types import Verdict
from headwater.verify.equivalence import compare

Pairs = list[tuple[str, str]]
RULES: dict[str, tuple[Pairs, Pairs]] = {
    "styling carries no meaning": (
        [
            (r"**12**", "12"), (r"\textbf{12}", "12"), (r"\color{blue}{12}", "12"),
            (r"\\frac{2}{9}", r"\frac{2}{9}"), (r"{2 \over 9}", r"\frac29"), ("12\\", "12"),
            (r"\left(2,\,9\right)", "(2,9)"), (r"\bigl(2,9\bigr)", "(2,9)"),
            (r"{9 \choose 2}", "36"), (r"12\text{.}", "12"), (r"12\ \checkmark", "12"),
        ],
        [
            (r"\left.2,9\right)", "(2,9)"), (r"\color{blue}{12}", "blue12"),
            (r"\frac12e5", "50000"), (r"{2 \over 9}", r"\frac92"),
        ],
    ),
    "a choice is its letter, or what it says": (
        [
            ("C. 12", "C"), ("(C) 12", "C"), (r"\text{(C)} 12", "C"), ("C. 12", "12"),
            (r"\textbf{(C) } 12", "(C)"), ("Option C", "C"), (r"\text{The answer is (C)}", "C"),
            ("C)", "C"), ("C", "(C) 12"), ("(C) 12", r"\text{C. } 12"),
        ],
        [
            ("C. 12", "D"), ("C. 12", "13"), ("(C) 12", "(C) 13"), ("(C) or (D)", "C"),
            ("(C) 12 or (D) 13", "C"), ("C. not this one", "C"), ("(B)(C)", "C"), ("ABC", "C"),
            ("(C", "C"), ("C)", "D"), ("C(x)", "C"), ("Option", "C"),
        ],
    ),
    "a word or letter is a unit only where it changes nothing": (
        [
            (r"7\text{ apples}", "7"), (r"7\text{ m}", "7"), (r"7\text{ N}", "7"),
            (r"3+4\mathrm{i}", "3+4i"), (r"2\mathrm{\pi}", r"2\pi"),
        ],
        [
            (r"3\mathrm{i}", "3"), (r"3+4\mathrm{i}", "7"), (r"7\text{M}", "7"), ("7 theta", "7"),
            (r"2\mathrm{\pi}", "2"), (r"0.3\text{ repeating}", "0.3"),
            (r"7\text{ hundredths}", "7"), (r"7\text{ lakh}", "7"), (r"7\text{ unlikely}", "7"),
        ],
    ),
    "a name in front of a value denies nothing": (
        [(r"\frac{NO}{BO} = 7", "7"), (r"\text{Area} = 7", "7")],
        [
            (r"\text{Not } x = 7", "7"), (r"\neg x = 7", "7"), (r"\cancel{x} = 7", "7"),
            (r"\text{twice } x = 7", "7"), (r"\nexists x \in (2,5)", "(2,5)"),
        ],
    ),
    "raised and lowered letters stay so": (
        [("2ˣ", "2^x"), ("aₙ", "a_n"), ("2ᵐ⁺ⁿ", "2^{m+n}"), (r"\pi**2", r"\pi^2")],
        [("2ˣ", "2x"), ("aₙ", "an"), (r"\pi**2", r"2\pi"), (r"\pi*-2", r"\pi-2")],
    ),
    "symbols that are no factors": (
        [(r"\angle P Q R", r"\angle PQR"), (r"\bar{z}", r"\overline{z}")],
        [
            ("f(2x)", "2f(x)"), ("f(-x)", "-f(x)"), ("f(g(x))", "g(f(x))"),
            (r"\frac{dy}{dx}", r"\frac{y}{x}"), (r"\angle PQR", r"\angle PRQ"),
            (r"\emptyset-\emptyset", "0"),
        ],
    ),
    "sets inside of sets, and of whole numbers": (
        [(r"\{5\}", "5"), (r"\{x \in \mathbb{R} : 0<x<3\}", "(0,3)")],
        [
            (r"\{\{7\}\}", "7"), (r"\{1,2\}", r"\{\{1\},2\}"), (r"(\{1\},\{2\})", "(1,2)"),
            (r"\{x \in \mathbb{Z} : 0<x<3\}", "(0,3)"), (r"\{x : 7\}", "7"),
        ],
    ),
    "ratios have all their terms alike": (
        [("0:4:6", "0:2:3"), ("4:12:12", "1:3:3")],
        [("0:0", "3:4"), ("0:1:2", "0:5:7")],
    ),
    "functions in pieces": (
        [("|x-1|+|x-2|", "|2-x|+|1-x|")],
        [
            ("|x-1|+|x-2|", "|2x-3|"), ("|x-1000|", "1000-x"),
            (r"\lfloor x\rfloor", r"\lceil x\rceil-1"),
        ],
    ),
    "digits in groups of three are one number": (
        [
            (r"41,\!250,\!000", "41250000"), ("41{,}250.5", "41250.5"), ("41 250", "41250"),
            ("-41,250", "-41250"),
        ],
        [
            ("41,25", "4125"), ("41{,}2", "412"), ("0,250", "250"), (r"1,\,2", "12"),
            (r"(4,\,1)", "41"), ("4,1250", "41250"), ("(41,250)", "41250"), ("3,000,00", "300000"),
        ],
    ),
    "words": (
        [
            ("forty-two", "42"), (r"\text{Saturday.}", "Saturday"), ("March 5", r"\text{March 5}"),
            (r"\text{rock'n'roll}", r"\text{rock'n'roll}"), (r"\text{well-known}", "well known"),
        ],
        [
            ("forty", "42"), (r"\text{a}+\text{b}", r"\text{ab}"), (r"\text{even or odd}", "even"),
            ("March 51", "March 5, 1"), (r"\text{Saturday?}", "Saturday"), ("Yes", "No"),
            (r"\text{not even}", "even"), (r"\text{even (}", "even"), ("notx", "x"),
        ],
    ),
    "times of day": (
        [
            ("3:45", r"3:45\text{ p.m.}"), ("15:45", "3:45 PM"), ("9 am", "9:00 a.m."),
            ("03:45", "3:45"), ("9", r"9 \text{ a.m.}"), ("3:45:00", "3:45"),
        ],
        [
            ("3:45 am", "3:45 pm"), ("15:45", "3:45 am"), ("12:00", "1:00"), ("3:45", "1:15"),
            ("3:46", "3:45"), (r"9\text{ min}", r"9\text{ a.m.}"), ("3:45:10", "3:45"),
        ],
    ),
    "units": (
        [
            ("60 mph", "60"), (r"9\text{ m/s}^2", "9"),
            (r"9 \frac{\text{m}}{\text{s}}", r"9\text{ m/s}"), ("USD 20", r"\$20"),
            (r"20\text{ euros}", "€20"), (r"5\text{ mol}", "5"), (r"\text{5 days}", "5"),
            (r"5\text{ square units}", r"5\text{ cm}^2"), (r"20\%\text{ of them}", r"20\%"),
            (r"\$5\text{ per hour}", "5 dollars per hour"), (r"\$5", r"\$5\text{ per hour}"),
        ],
        [
            (r"9\text{ m/s}", r"9\text{ km/h}"), ("€20", r"\$20"), ("20 USD", "20 EUR"),
            ("5k", "5"), ("5 a", "5"), (r"\text{5 or 6}", "5"), (r"\text{5 days}", "6"),
            ("20ish", "20"), ("5%%", "5"),
            (r"5\text{ square units}", r"5\text{ units}"), (r"5\text{ units}", r"5\%"),
            (r"x\text{ m}^2", r"x^2\text{ m}"), (r"\$5\text{ cm}", r"5\text{ cm}"),
            (r"5\text{ m}^2\text{ per second}", r"5\text{ m}^2"),
            (r"3\text{ hours}", r"3\text{ minutes}"), (r"5\text{ cm}^2", r"5\text{ cm}^3"),
        ],
    ),
    "a name stands before a value": (
        [
            ("x_1 = 3", "3"), ("x1=3", "x_1=3"), ("= 3", "3"), ("y = 2x-1", "f(x) = 2x-1"),
            ("f(n) = 4", "f(x) = 4"), ("f^{-1}(x) = x/2", "x/2"), ("(u,v)=(3,8)", "(3,8)"),
        ],
        [
            ("x=3", "x=-3"), ("x=3", "y=3"), ("f(x)=x", "g(x)=x"), ("f(x)=x", "f(y)=y"),
            ("at least = 3", "3"), (r"\text{wrong}=3", "3"), ("3=3", "3"), ("x=2+1=3", "3"),
            ("x=y=3", "3"), ("6 = 600\\%", "6"), ("x = 3 or 4", "3"),
        ],
    ),
    "inequalities and membership are sets under a name": (
        [
            ("x>2", r"(2,\infty)"), ("2<x", "x>2"), (r"-x>-2", "x<2"), (r"x\in(2,5]", r"2<x\le 5"),
            (r"x>2\text{ and }x\le 5", "(2,5]"), (r"|x|\le 2", "[-2,2]"),
            (r"x\ne 4", r"(-\infty,4)\cup(4,\infty)"), (r"\{1\}\cup\{2\}", r"\{1,2\}"),
            (r"x<2\text{ or }x>5", r"x>5\text{ or }x<2"),
            (r"\mathbb{R}\setminus\{4\}", r"(-\infty,4)\cup(4,\infty)"),
        ],
        [
            ("x>2", "y>2"), ("x>2", r"x\ge 2"), (r"x\in(2,5]", r"x\in[2,5]"), ("x>2", "x>-2"),
            (r"x>2\text{ and }x\le 5", r"x>2\text{ or }x\le 5"), ("x>2", "2"),
            (r"x\in(2,5]", "5"), (r"(1,2)\text{ or }(3,4)", r"(1,2)\cup(3,4)"), ("x>", "x"),
            ("|x>2", "x>2"),
            (r"\mathbb{R}\setminus\{4\}", r"\mathbb{R}\setminus\{5\}"),
        ],
    ),
    "lists, sets and points": (
        [
            ("x=3,y=8", "(3,8)"), ("y=8,x=3", "(x,y)=(3,8)"), (r"\{3,8,3\}", r"\{8,3\}"),
            ("(1,2),(3,4)", "(3,4),(1,2)"), ("(1,2);(3,4)", "(3,4), (1,2)"),
            (r"\langle3,8\rangle", "(3,8)"), (r"\{8\}", "8"),
            ("x=3, x=8", "8, 3"), (r"\begin{cases}x=3\\y=8\end{cases}", "x=3,y=8"),
        ],
        [
            ("y=3,x=8", "(x,y)=(3,8)"), ("x=3,y=8", r"\{3,8\}"), ("3,3", "3"), ("3,3,8", "3,8"),
            ("(1,2),(3,4)", "(2,1),(3,4)"), ("(1,2,3)", "(1,2),3"),
            (r"\{\emptyset\}", r"\emptyset"),
            (r"\{(1,2)\}", r"\{1,2\}"), (r"\{3,8", r"\{3,8\}"), ("3,", "3,8"), ("3 or", "3"),
            (r"\begin{cases}x=8\\y=3\end{cases}", "x=3,y=8"), ("[3,8]", r"\{3,8\}"),
        ],
    ),
    "matrices": (
        [
            (r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
            (r"-\begin{pmatrix}2&4\end{pmatrix}", r"\begin{pmatrix}-2&-4\end{pmatrix}"),
            (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", "[[1,2],[3,4]]"),
        ],
        [
            (r"2\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
            (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
            (r"(\begin{array}{c}1\\2\end{array}]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
            (r"\begin{pmatrix}1\\2", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ],
    ),
    "bases": (
        [(r"1011 \text{ base } 2", "1011_2"), (r"1011_{(2)}", "1011_2"), ("2A_{16}", "2a_{16}")],
        [("1011_2", "11"), ("1012_2", "1012_2 + 1"), ("1011_2", "1011_3"), ("1011_{2", "1011")],
    ),
    "expressions": (
        [
            ("2^3 3^2", "72"), (r"4.\dot{3}", "13/3"), ("5 0/7", "5"), (r"\sqrt[3]{-8}", "-2"),
            (r"(-8)^{1/3}", "-2"),
            (r"+\infty", r"\infty"), ("infinity", r"\infty"),
            (r"\sqrt{\frac{1}{n}}", r"\frac{1}{\sqrt n}"), (r"10\pi i", r"i\cdot10\pi"),
        ],
        [
            (r"\sqrt[3]{-8}", "2"), (r"\infty+1", r"\infty"), (r"2\infty", r"\infty"),
            (r"\infty", r"-\infty"), ("3 + 2i", "3 - 2i"), ("5 7/0", "5"),
            (r"\sqrt{2", r"\sqrt{2}"), ("2^3 3^2", "2^{33^2}"), ("5th root of 7", "5"),
            ("x^2 + 1", "x^{2+1}"),
            (r"\ln x^2", r"\ln x"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    equal, different = RULES[rule]
    rejected = [p for p in equal if compare(*p).verdict is not Verdict.CORRECT]
    accepted = [p for p in different if compare(*p).verdict is Verdict.CORRECT]
    assert (rejected, accepted) == ([], [])
