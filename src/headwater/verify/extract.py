"""Where in a completion the answer stands: explicit forms, nothing guessed, nothing from thinking.

Everything here is one pass over the text, whatever a model may have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

AnswerForm = Literal["boxed", "hash", "answer_is"]
ANSWER_FORMS: tuple[AnswerForm, ...] = get_args(AnswerForm)

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_NESTED_BOXES = 4
_BOX = re.compile(r"\\boxed(?![a-zA-Z])")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*([^\s${}][^\s$]*)")
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(r"\banswer\s{0,9}(?:is\b|:)[ \t]*:?[ \t]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z]|\s*$)")


def extract_answer(completion: str, policy: AnswerForm = "boxed") -> str | None:
    r"""Return the answer a completion gives in the form asked for, or None where it gives none.

    "boxed" is the content of the last complete `\boxed{}` with anything in it (`\boxed 7` and
    `\boxed {7}` count), and "" where all boxes are empty;
    "hash" what follows the last `####` on its line, "answer_is" what follows the last
    "answer is" up to the end of its sentence. Thinking never counts: with closed thinking only
    the text after it is read, with thinking left open nothing is.

    >>> extract_answer(r"<think>\boxed{1}</think> so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> extract_answer("2 + 2 makes\n#### 4", "hash")
    '4'
    """
    spoken = after_thinking(completion)
    if spoken is None:
        return None
    if policy == "boxed":
        return _last_box(spoken)
    if policy == "hash":
        matches = _HASH.findall(spoken)
        return matches[-1].strip() if matches else None
    return _closing_sentence(spoken)


def extract_first(completion: str, policies: Sequence[AnswerForm]) -> str | None:
    """Return the answer in the first of `policies` in which the completion gives one."""
    for policy in policies:
        answer = extract_answer(completion, policy)
        if answer is not None:
            return answer
    return None


def after_thinking(completion: str) -> str | None:
    """Return what stands after the last closed thinking part; None if thinking is left open.

    >>> after_thinking("<think>hm</think> 4"), after_thinking("<think>hm")
    (' 4', None)
    """
    start = 0
    for _, closing in _THINKING_TAGS:
        place = completion.rfind(closing)
        if place >= 0:
            start = max(start, place + len(closing))
    spoken = completion[start:]
    if any(opening in spoken for opening, _ in _THINKING_TAGS):
        return None
    return spoken


def _last_box(text: str) -> str | None:
    answer = _outer_box(text)
    for _ in range(_NESTED_BOXES):
        if answer is None or not answer.startswith("\\boxed"):
            break
        answer = _outer_box(answer) or answer
    return answer


def _outer_box(text: str) -> str | None:
    if "\\boxed" not in text:
        return None
    closing_of = _matching_braces(text)
    answer: str | None = None
    covered_to = 0
    for box in _BOX.finditer(text):
        if box.start() < covered_to:
            continue
        brace = box.end()
        while brace < len(text) and text[brace].isspace():
            brace += 1
        if brace < len(text) and text[brace] == "{":
            closing = closing_of.get(brace)
            if closing is not None:
                covered_to = closing
                answer = text[brace + 1 : closing].strip() or answer or ""
        elif bare := _BARE_BOX.match(text, box.end()):
            answer, covered_to = bare.group(1), bare.end()
    return None if answer is None else answer.strip()


def _matching_braces(text: str) -> dict[int, int]:
    r"""Map each closed `{` to its `}`; escaped braces (`\{`) are letters."""
    closing_of: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _BRACES.finditer(text):
        if match.group() == "{":
            open_braces.append(match.start())
        elif match.group() == "}" and open_braces:
            closing_of[open_braces.pop()] = match.start()
    return closing_of


def _closing_sentence(text: str) -> str | None:
    starts = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not starts:
        return None
    sentence = text[starts[-1] :].partition("\n")[0]
    dollar = re.match(r"\s*\$([^$\n]+)\$", sentence)
    if dollar:
        return dollar.group(1).strip()
    return _SENTENCE_END.split(sentence, maxsplit=1)[0].strip().strip("*").strip() or None
