"""`--explain`: what was read, in words, and the command line around it."""

import json
from pathlib import Path

import pytest

from headwater import api
from headwater.cli.entry import main
from headwater.types import Label
from headwater.verify.describing import describe, explain_grade
from headwater.verify.verifiers import make_verifier


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("1,000", "1000: a number"),
        (r"\dfrac{1}{3}x^2", "(1/3) * (x ^ 2): an expression"),
        (r"x = 5 \text{ cm}", "x = 5 cm: a value under a name"),
        (r"[0, 1) \cup \{3\}", "[0, 1) U {3}: a union of sets"),
        ("(0, 1)", "(0, 1): a tuple, point or interval"),
        (r"\{1, 2\}", "{1, 2}: a set"),
        ("3, 4", "3, 4: several values, in no order"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[1, 2; 3, 4]: a matrix"),
        ("y = 2x + 1", "y = (2 * x) + 1: a value under a name"),
        ("x + y = 1", "x + y = 1: an equation or inequality"),
        ("1:2", "1 : 2: a ratio"),
        ("101_2", "101 in base 2: a numeral with its base"),
        (r"\text{odd}", "odd: words"),
        ("C. 12", "C: 12: a lettered choice and what it says"),
        (r"3:45\text{ p.m.}", "3:45:00 pm: a time of day"),
        (r"\int_0^1 x", "mathematics for the algebra system"),
        ("{" * 60 + "}" * 60, "not read: nested too deeply"),
    ],
)
def test_answers_in_words(answer: str, words: str) -> None:
    assert words in describe(answer)


def test_steps_of_a_grade() -> None:
    completion = r"<think>\boxed{4}</think> so \boxed{\frac{1}{2}}"
    with make_verifier("math") as verifier:
        steps = explain_grade(completion, Label("p", "0.5"), verifier.explain(completion, "0.5"))
        assert list(steps) == ["thinking", "answer", "read as", "gold", "gold read as", "verdict"]
        assert steps["thinking"] == "the first 24 characters, which do not count"
        assert steps["answer"] == r"\frac{1}{2}  (from the last complete \boxed{})"
        assert steps["verdict"] == "correct: compared as fractions"
        silent = explain_grade("<think> 4", Label("p", "4"), verifier.explain("<think> 4", "4"))
    assert silent["thinking"].startswith("left open")
    assert silent["answer"] == "none was read"


def test_one_prediction_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--explain", "--prediction", "\\boxed{7}\x1b[31m", "--gold", "7.0"])
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "from the last complete \\boxed{}" in shown and "1 case: 1 correct" in shown
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--gold", "7"])
    assert ended.value.code == 2


def test_control_characters_are_shown_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--explain"], []):
        with pytest.raises(SystemExit):
            main(["verify", *options, "--prediction", "\\boxed{\x1b[2J7}", "--gold", "\x1b[2J"])
        assert "\x1b" not in capsys.readouterr().out


def test_steps_are_in_the_json(tmp_path: Path) -> None:
    result = api.verify([(r"\boxed{1}", "1"), ("1", "1")], explain=True)
    result.write(tmp_path / "rows.jsonl")
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (first["reward"], second["reward"]) == (1.0, 0.0)
    assert first["steps"]["read as"] == "1: a number"


def test_unboxed_predictions_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--prediction", "7", "--gold", "7"])
    assert "--wrap-bare" in capsys.readouterr().out
