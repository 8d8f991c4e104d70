r"""The final answer inside a worked solution of a data set: `####` lines and `\boxed`.

These read trusted data once, when it is loaded; what models write is read by
`headwater.verify`.
"""

from __future__ import annotations

import re

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_BOX = re.compile(r"\\f?boxed\s*(?:\{|([^\s{}$]))")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def split_gsm8k(text: str) -> tuple[str, str]:
    """(worked solution without calculator annotations, final answer without thousands commas).

    >>> split_gsm8k("2 boxes of 500 are 2*500=<<2*500=1000>>1000.\\n#### 1,000")
    ('2 boxes of 500 are 2*500=1000.', '1000')
    """
    worked, _, answer = text.rpartition("####")
    return _CALCULATOR.sub("", worked).strip(), _THOUSANDS.sub("", answer.strip())


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` (`\boxed 7` counts); None without one.

    >>> last_boxed(r"so $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    for box in reversed(list(_BOX.finditer(text))):
        if box[1] is not None:
            return box[1]
        depth = 1
        for brace in _BRACES.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[box.end() : brace.start()].strip()
    return None


def clean_answer(answer: str) -> str:
    r"""A final answer without surrounding space, `$...$` and `\boxed{...}`.

    >>> clean_answer(r" $\boxed{7}$ ")
    '7'
    """
    answer = answer.strip()
    while len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        answer = answer[1:-1].strip()
    if answer.startswith(("\\boxed", "\\fbox")):
        inside = last_boxed(answer)
        if inside is not None:
            return inside
    return answer
