"""Calling a user's reward function on a group of completions; in killable workers, but for a
function object of the process that started the run.

The signature is the one that trainers share: `f(prompts, completions, **columns) -> list[float]`,
plain or async, every argument a list with one entry a completion; `completion_ids` are their
tokens. A function that names its parameters is given those alone.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable
from typing import Any

from headwater.verify.loading import load_function

_NOT_COLUMNS = ("prompt", "completion", "completions", "prompts", "completion_ids")


def caller(target: str) -> Callable[[str, str], str]:
    """Return what a worker calls: (completions, row), both as JSON -> rewards as JSON.

    target: "module:function". Raises what `load_function` does, and TypeError for a function
    that takes no completions.
    """
    return call_of(load_function(target))


def call_of(
    function: Callable[..., Any], raised: Callable[[Exception, str], None] | None = None
) -> Callable[[str, str], str]:
    """`caller` of a function itself. raised: told what it raises, and where.

    Raises TypeError for a function that takes no completions.
    """
    accepted, needed = accepted_names(function), needed_columns(function)

    def call(completions: str, row: str) -> str:
        arguments = _arguments(json.loads(completions), json.loads(row), accepted)
        try:
            rewards = function(**arguments)
            if inspect.isawaitable(rewards):
                rewards = asyncio.run(_awaited(rewards))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            absent = sorted(needed - arguments.keys())
            place = f"TypeError (no column {', '.join(absent)})" if absent else _place(error)
            if raised is not None:
                raised(error, place)
            return json.dumps({"raised": place})
        return json.dumps(_reply(rewards))

    return call


async def _awaited(rewards: Any) -> Any:
    return await rewards


def needed_columns(function: Callable[..., Any]) -> frozenset[str]:
    """Columns without which a function cannot be called: its parameters without a default."""
    return frozenset(
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ) - {"prompts", "completions", "completion_ids"}


def accepted_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the parameters; None where any keyword goes.

    Raises TypeError for a function that takes no completions.
    """
    parameters = inspect.signature(function).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    if not names & {"completions", "completion_ids"}:
        raise TypeError(
            f"it takes ({', '.join(sorted(names))}); a reward function takes completions, and "
            "prompts, completion_ids and **columns if it likes"
        )
    return names


def _arguments(
    completions: list[str], row: dict[str, Any], accepted: frozenset[str] | None
) -> dict[str, Any]:
    """Keyword arguments; completions are messages where the prompt is.

    row: the problem's columns, and `completion_ids`, a list of tokens a completion, if known.
    """
    count = len(completions)
    prompt = row.get("prompt", "")
    said: list[Any] = list(completions)
    if isinstance(prompt, list):
        said = [[{"role": "assistant", "content": text}] for text in completions]
    columns = {name: [value] * count for name, value in row.items() if name not in _NOT_COLUMNS}
    arguments = columns | {"prompts": [prompt] * count, "completions": said}
    if "completion_ids" in row:
        arguments["completion_ids"] = row["completion_ids"]
    if accepted is None:
        return arguments
    return {name: value for name, value in arguments.items() if name in accepted}


def _reply(rewards: Any) -> dict[str, Any]:
    """The rewards as plain numbers (arrays too), or what was found instead."""
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        return {"found": type(rewards).__name__}
    plain = [item.item() if hasattr(item, "item") else item for item in rewards]
    for item in plain:
        if item is not None and not isinstance(item, bool | int | float):
            return {"found": f"a list with {type(item).__name__} in it"}
    return {"rewards": [None if item is None else float(item) for item in plain]}


def _place(error: Exception) -> str:
    """An exception's type and where it was raised; its text may quote an answer and stays here."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f" at {last.filename.rpartition('/')[2]}:{last.lineno}" if last else ""
    return f"{type(error).__name__}{where}"
