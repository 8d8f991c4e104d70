"""Where the answer of a completion is read."""

import pytest

from headwater.verify.extract import extract_answer, extract_first


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed 7", "7"),
        (r"$\boxed 42$ is it", "42"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and \boxed{never closes", "4"),
        (r"\boxed{outer never closes \boxed{4}", "4"),
        (r"set { not closed \boxed{4}", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{6}, as it should stand in \boxed{}", "6"),
        (r"\boxed{6} and \boxed{ } and \boxed{8}", "8"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"thinking from the prompt on \boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1} <think>hm</think> \boxed{2} <think>and</think> \boxed{3}", "3"),
        (r"[THINK]\boxed{1}[/THINK]\boxed{2}", "2"),
    ],
)
def test_last_complete_box_after_thinking_counts(completion: str, answer: str) -> None:
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "no answer at all",
        r"\boxed{never closes",
        r"\boxedness{3}",
        r"<think>\boxed{1}</think> that was it",
        r"\boxed{1} <think> wait",
        r"<think>\boxed{1}",
        "#### 5",
    ],
)
def test_no_box_means_no_answer(completion: str) -> None:
    assert extract_answer(completion) is None


@pytest.mark.parametrize(
    ("completion", "form", "answer"),
    [
        ("2 + 2\n#### 4\n", "hash", "4"),
        ("#### 3\nno:\n#### 1,200", "hash", "1,200"),
        (r"\boxed{4}", "hash", None),
        ("The answer is 3.5 apples. I hope so.", "answer_is", "3.5 apples"),
        (r"Final Answer: The final answer is $28 \%$. I hope it is.", "answer_is", r"28 \%"),
        ("the answer is 1. No, the answer is **2**", "answer_is", "2"),
        ("nothing", "answer_is", None),
    ],
)
def test_other_forms_by_explicit_policy(completion: str, form: str, answer: str | None) -> None:
    assert extract_answer(completion, form) == answer  # type: ignore[arg-type]


def test_forms_are_tried_in_order() -> None:
    assert extract_first("\\boxed{1}\n#### 2", ("hash", "boxed")) == "2"
    assert extract_first("\\boxed{1}", ("hash", "boxed")) == "1"


def test_extraction_is_linear_in_hostile_text() -> None:
    assert extract_answer("\\boxed{" * 100_000) is None
    assert extract_answer("\\boxed{" * 20_000 + "1" + "}" * 20_000) is not None
    assert extract_answer("<think>" * 100_000) is None
