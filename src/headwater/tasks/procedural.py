"""Problems of the reasoning-gym library and its scoring; the one module that imports it.

A source is `reasoning_gym:NAME?size=500&seed=0&...`; further options are those of the task's
configuration. Some tasks draw from sets, so their problems depend on Python's hash seed: they are
made in a process of their own (`python -m headwater.tasks.procedural`) where it is fixed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from typing import Any

from headwater.config.plain_yaml import parse_yaml
from headwater.errors import InputError
from headwater.tasks.problems import LabelledProblems, source_options
from headwater.types import Label, Problem

#: The key of a label's row that holds what the library scores with.
ENTRY = "reasoning_gym"

_DEFAULTS = {"size": 500, "seed": 0}
_COLLECTIONS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def load(source: str) -> LabelledProblems:
    """Problems of one task of the library; their labels carry what its scoring needs.

    Raises InputError where the library is not installed, for an unknown task, and for options
    that its configuration refuses.
    """
    name = source.partition("?")[0].removeprefix("reasoning_gym:")
    options = _DEFAULTS | {key: _scalar(text) for key, text in source_options(source).items()}
    reply = _make_apart({"name": name, "options": options})
    if "refused" in reply:
        raise InputError(f"{source}: {reply['refused']}")
    problems, labels = [], []
    for index, entry in enumerate(reply["entries"]):
        problem_id = f"{name}-{options['seed']}-{index}"
        row = {"task": name, "options": options, "entry": entry["entry"]}
        problems.append(Problem(problem_id, entry["question"], f"reasoning_gym/{name}", None, name))
        labels.append(Label(problem_id, entry["answer"], None, {ENTRY: row}))
    if not problems:
        raise InputError(f"{source}: size={options['size']} makes no problems; ask for some")
    return LabelledProblems.of(problems, labels)


def scorer(library: str) -> Callable[[str, str], float]:
    """Load the library, and return its scoring: (answer, label's row as JSON) -> 0 to 1."""
    import_module(library)

    def score(answer: str, row: str) -> float:
        record = json.loads(row)
        dataset = _dataset(record["task"], json.dumps(record["options"], sort_keys=True))
        return float(dataset.score_answer(answer, _from_json(record["entry"])))

    return score


def library_version() -> str:
    """The installed version; it decides the problems and the scores. "" where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=64)
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(options))


def _scalar(text: str) -> Any:
    try:
        return parse_yaml(text, "option")
    except InputError:
        return text


def _make_apart(request: Mapping[str, Any]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "headwater.tasks.procedural"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return {"refused": f"the library failed ({last[0]}); try other options"}
    reply: dict[str, Any] = json.loads(process.stdout)
    return reply


def _make(request: Mapping[str, Any]) -> dict[str, Any]:
    """What `_make_apart` returns: {"entries": [...]} or {"refused": why}."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return {
            "refused": "needs the package reasoning-gym; pip install 'headwater[reasoning-gym]'"
        }
    name, options = request["name"], request["options"]
    if name not in DATASETS or name == "composite":
        close = get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        return {"refused": f"{name!r} is no task of reasoning-gym; use {', '.join(close)}"}
    known = DATASETS[name][1].__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        return {"refused": f"unknown option {unknown[0]!r}; choose from {', '.join(known)}"}
    try:
        made = list(_dataset(name, json.dumps(options, sort_keys=True)))
        entries = [
            {
                "question": entry["question"].strip(),
                "answer": "" if entry["answer"] is None else str(entry["answer"]),
                "entry": _to_json(entry),
            }
            for entry in made
        ]
    except Exception as error:  # the library checks its options with whatever is at hand
        reason = str(error) or type(error).__name__
        return {"refused": f"refused by reasoning-gym ({reason}); change the options"}
    return {"entries": entries}


def _to_json(value: Any) -> Any:
    """Plain JSON that keeps tuples, sets and keys that are no text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        items = [_to_json(item) for item in value]
        if not isinstance(value, tuple):
            items.sort(key=json.dumps)
        return {type(value).__name__: items}
    raise TypeError(f"a {type(value).__name__} in its metadata cannot be kept")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "dict":
            return {_from_json(key): _from_json(item) for key, item in items}
        return _COLLECTIONS[kind](_from_json(item) for item in items)
    return value


if __name__ == "__main__":
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever the library prints is no reply
    json.dump(_make(json.load(sys.stdin)), replies)
