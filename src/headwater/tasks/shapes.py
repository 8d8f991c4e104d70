r"""The shapes of problem rows, known by their column names.

| shape | columns |
| --- | --- |
| headwater | problem, answer; optional id, source, level, subject, solution |
| MATH | problem, solution (final answer in `\boxed`); optional level "Level 3", type |
| GSM8K | question, answer (worked solution, then `#### final answer`) |
| DAPO-Math-17k | prompt (messages or text, in its template), reward_model.ground_truth |
| TRL | prompt (text or messages); answer, or a solution that is or boxes the final answer |
| completions | prompt and completion (text or messages): the completion is the worked solution |
| messages | messages, of which the last, the assistant's, is the worked solution |
| prompts | prompt or problem, where a reward function judges instead of an answer |
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.errors import InputError
from headwater.tasks.final_answers import clean_answer, last_boxed, split_gsm8k
from headwater.tasks.rows import Row
from headwater.types import Label, Problem

FIELDS = ("id", "problem", "answer", "source", "level", "subject", "solution")
_ID_COLUMNS = ("id", "unique_id")
_SUBJECT_COLUMNS = ("subject", "type")
_ROLES = ("system", "user", "assistant")
_LEVEL = re.compile(r"(?:Level )?(\d+)")
_LONGEST_BARE_ANSWER = 200  # characters; a longer `solution` without a box is a derivation

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows of one shape become problems and labels.

    needs: the columns that make the shape; text: row -> (prompt, answer, worked solution);
    columns: our field name -> theirs; repeats: the data set is known to hold copies of its rows;
    keeps_rows: labels carry their rows, and a reward function takes the place of an answer. Rows
    that show what to write need no final answer either.
    """

    name: str
    needs: tuple[str, ...]
    text: Callable[[Row], tuple[str, str, str | None]]
    columns: Mapping[str, str]
    repeats: bool
    keeps_rows: bool = False

    def read(self, row: Row, source: str, index: int) -> tuple[Problem, Label]:
        """The problem and the label of a row; `source` and `index` name it where it does not.

        Raises InputError, with the row's place, for missing or unusable values.
        """
        row = _renamed(row, self.columns)
        for column in self.needs:
            if row.values.get(column) is None:
                raise InputError(
                    f"{row.where}: {column!r} is missing (columns: {', '.join(row.values)}); "
                    f"every {self.name} row needs {' and '.join(self.needs)}"
                )
        prompt, answer, solution = self._parts(row)
        if not prompt.strip():
            raise InputError(f"{row.where}: the problem is empty; write its text or drop the row")
        answer = clean_answer(answer)
        if not answer and not (self.keeps_rows or self.text in (_completion, _messages)):
            raise InputError(f"{row.where}: the answer is empty; write it or drop the row")
        problem_id = _id(row, f"{source}-{index}")
        return (
            Problem(
                id=problem_id,
                prompt=prompt.strip(),
                source=_shared(_optional_text(row, ("source", "data_source"))) or source,
                level=_level(row),
                subject=_shared(_optional_text(row, _SUBJECT_COLUMNS)),
                before=_before(row, self.needs),
            ),
            Label(
                problem_id,
                answer,
                solution.strip() if solution and solution.strip() else None,
                _kept(row, prompt) if self.keeps_rows else None,
            ),
        )

    def _parts(self, row: Row) -> tuple[str, str, str | None]:
        try:
            return self.text(row)
        except InputError:
            if not self.keeps_rows or not any(row.values.get(name) for name in _PROMPT_COLUMNS):
                raise
            return _prompt_alone(row)


def recognise(row: Row, columns: Mapping[str, str], *, keep_rows: bool = False) -> Shape:
    """The shape of a source by its first row; `columns` (our name -> theirs) goes before.

    keep_rows: labels carry their rows for a reward function, and a prompt alone is enough.
    Raises InputError for a row of no known shape, and for a mapping that names a field we do
    not have or a column the row does not have.
    """
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            raise InputError(
                f"columns maps {ours!r}, which is no field; use one of {', '.join(FIELDS)}"
            )
        if _reach(row.values, theirs) is None:
            raise InputError(
                f"{row.where}: columns maps {ours!r} to {theirs!r}, which is not among "
                f"{', '.join(row.values)}; name an existing column"
            )
    present = {name for name, value in _renamed(row, columns).values.items() if value is not None}
    for name, needs, text in (*_SHAPES, *(_PROMPTS_ALONE if keep_rows else ())):
        if present.issuperset(needs):
            return Shape(name, needs, text, dict(columns), text is _dapo, keep_rows)
    known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs, _ in _SHAPES)
    raise InputError(
        f"{row.where}: columns {', '.join(row.values)} are of no known shape: {known}; name them "
        "with task.columns, for instance {problem: question, answer: final}"
    )


def _kept(row: Row, prompt: str) -> dict[str, Any]:
    """The whole row, with the prompt under the name that reward functions know."""
    try:
        json.dumps(row.values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{row.where}: {error}; a reward function is given every column, as text, numbers and "
            "lists of them: drop or convert the others"
        ) from None
    return {"prompt": prompt, **row.values}


def _headwater(row: Row) -> tuple[str, str, str | None]:
    answer = _text(row, "answer")
    solution = _optional_text(row, ("solution",))
    if "####" in answer:
        worked, answer = split_gsm8k(answer)
        solution = solution or worked
    return _text(row, "problem"), answer, solution


def _math(row: Row) -> tuple[str, str, str | None]:
    solution = _text(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise InputError(
            rf"{row.where}: the solution has no \boxed answer; add one, or an answer column"
        )
    return _text(row, "problem"), answer, solution


def _gsm8k(row: Row) -> tuple[str, str, str | None]:
    text = _text(row, "answer")
    if "####" not in text:
        raise InputError(
            f"{row.where}: the answer has no '#### final answer' line; add it, or say with "
            "task.columns {problem: question, answer: answer} that it is the final answer"
        )
    worked, answer = split_gsm8k(text)
    return _text(row, "question"), answer, worked


def _dapo(row: Row) -> tuple[str, str, str | None]:
    prompt = _prompt(row).strip()
    prompt = prompt.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER)
    answer = _reach(row.values, "reward_model.ground_truth")
    if answer is None:
        raise InputError(f"{row.where}: reward_model has no ground_truth; add it or drop the row")
    return prompt, _as_text(row, "reward_model.ground_truth", answer), None


def _trl_answer(row: Row) -> tuple[str, str, str | None]:
    return _prompt(row), _text(row, "answer"), _optional_text(row, ("solution",))


def _trl_solution(row: Row) -> tuple[str, str, str | None]:
    solution = _text(row, "solution")
    answer = last_boxed(solution)
    if answer is not None:
        bare = clean_answer(solution) == answer
        return _prompt(row), answer, None if bare else solution
    if "####" in solution:
        worked, answer = split_gsm8k(solution)
        return _prompt(row), answer, worked
    if len(solution) > _LONGEST_BARE_ANSWER or "\n" in solution.strip():
        raise InputError(
            rf"{row.where}: the solution of {len(solution)} characters marks no final answer; "
            r"put it in \boxed{}, or add an answer column"
        )
    return _prompt(row), solution, None


def _completion(row: Row) -> tuple[str, str, str | None]:
    said = row.values["completion"]
    if not isinstance(said, str):
        chat = _messages_of(row, "completion")
        if [role for role, _ in chat] != ["assistant"]:
            raise InputError(
                f"{row.where}: completion has messages of {_roles(chat)}, expected text or one "
                "message of the assistant's; put what comes before it into prompt"
            )
        said = chat[0][1]
    return _prompt(row), _final_answer(said), said


def _messages(row: Row) -> tuple[str, str, str | None]:
    chat = _messages_of(row, "messages")
    if [role for role, _ in chat[-2:]] != ["user", "assistant"]:
        raise InputError(
            f"{row.where}: messages are of {_roles(chat)}, expected the user's and the assistant's "
            "as the last two; drop what comes after, or the row"
        )
    return chat[-2][1], _final_answer(chat[-1][1]), chat[-1][1]


def _final_answer(text: str) -> str:
    """The answer that a worked solution marks; nothing where it marks none."""
    found = last_boxed(text)
    if found is None and "####" in text:
        found = split_gsm8k(text)[1]
    return found or ""


_SHAPES: tuple[tuple[str, tuple[str, ...], Callable[[Row], tuple[str, str, str | None]]], ...] = (
    ("headwater", ("problem", "answer"), _headwater),
    ("MATH", ("problem", "solution"), _math),
    ("GSM8K", ("question", "answer"), _gsm8k),
    ("DAPO-Math-17k", ("prompt", "reward_model"), _dapo),
    ("TRL", ("prompt", "answer"), _trl_answer),
    ("TRL", ("prompt", "solution"), _trl_solution),
    ("completions", ("prompt", "completion"), _completion),
    ("messages", ("messages",), _messages),
)


def _prompt_alone(row: Row) -> tuple[str, str, str | None]:
    if row.values.get("prompt") is not None:
        return _prompt(row), "", None
    return _text(row, "problem" if "problem" in row.values else "question"), "", None


_PROMPT_COLUMNS = ("prompt", "problem", "question")
_PROMPTS_ALONE = tuple(("prompts", (column,), _prompt_alone) for column in _PROMPT_COLUMNS)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    mapped = {ours: _reach(row.values, theirs) for ours, theirs in columns.items()}
    return Row(row.place, row.number, {**row.values, **mapped})


def _reach(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of `a.b` inside record a; None where there is none."""
    if column in values:
        return values[column]
    head, dot, rest = column.partition(".")
    inside = values.get(head)
    return _reach(inside, rest) if dot and isinstance(inside, Mapping) else None


def _id(row: Row, default: str) -> str:
    for column in (*_ID_COLUMNS, "extra_info.index"):
        value = _reach(row.values, column)
        if value is not None:
            text = _as_text(row, column, value).strip()
            if not text:
                raise InputError(f"{row.where}: {column} is empty; give every problem its own")
            return text
    return default


def _level(row: Row) -> int | None:
    value = row.values.get("level")
    if value is None or value == "Level ?":
        return None
    match = _LEVEL.fullmatch(_as_text(row, "level", value).strip())
    if match is None:
        raise InputError(f"{row.where}: level {value!r} is no level; write 3 or 'Level 3'")
    return int(match[1])


def _prompt(row: Row) -> str:
    """The user's last text of a prompt given as text or as chat messages."""
    prompt = row.values["prompt"]
    return prompt if isinstance(prompt, str) else _asked(row, "prompt")[-1][1]


def _before(row: Row, needs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The messages before the user's last one, of a shape that has messages."""
    if "messages" in needs:
        return tuple(_messages_of(row, "messages")[:-2])
    if "prompt" in needs and not isinstance(row.values["prompt"], str):
        return tuple(_asked(row, "prompt")[:-1])
    return ()


def _asked(row: Row, column: str) -> list[tuple[str, str]]:
    """Messages that end with the user's."""
    chat = _messages_of(row, column)
    if chat[-1][0] != "user":
        raise InputError(
            f"{row.where}: {column} has messages of {_roles(chat)}, expected a user's as the last, "
            "which the model answers; leave out what comes after it"
        )
    return chat


def _messages_of(row: Row, column: str) -> list[tuple[str, str]]:
    """(role, text) of each message of a column, at least one."""
    found = row.values[column]
    chat = [
        (one["role"], one["content"])
        for one in (found if isinstance(found, list | tuple) else ())
        if isinstance(one, Mapping)
        and one.get("role") in _ROLES
        and isinstance(one.get("content"), str)
    ]
    if not chat or len(chat) != len(found):
        raise InputError(
            f"{row.where}: {column} {str(found)[:60]!r} is neither text nor chat messages; write "
            f"text, or a list of {{role, content}} with role one of {', '.join(_ROLES)} and text "
            "as content (the chat template is applied later)"
        )
    return chat


def _roles(chat: Sequence[tuple[str, str]]) -> str:
    return ", ".join(role for role, _ in chat)


def _text(row: Row, column: str) -> str:
    return _as_text(row, column, row.values[column])


def _optional_text(row: Row, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = row.values.get(name)
        if value is not None:
            return _as_text(row, name, value)
    return None


def _shared(text: str | None) -> str | None:
    """One copy of a text that many rows have, instead of one a row."""
    return None if text is None else sys.intern(text)


def _as_text(row: Row, column: str, value: object) -> str:
    """Text as it is, numbers as people write them (27.0 is 27)."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise InputError(
        f"{row.where}: {column} is {str(value)[:40]!r} of type {type(value).__name__}; "
        "write text or a number"
    )
