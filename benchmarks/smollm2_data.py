"""The problem files of recipes/smollm2-study.yaml, made from MAWPS and SVAMP as you have them.

    python benchmarks/smollm2_data.py --mawps mawps.jsonl --svamp svamp.jsonl --out FOLDER

A source is what `task.train` of a recipe may be: a file, or hf:ID. Kept are the problems that a
model of 135M parameters can hope for: one operation on two of a problem's numbers gives the answer,
only one does, and all three are whole numbers up to 100. That operation is the worked solution.
Problems are dealt by a hash of their ids, and none in training shares half of its 8-grams with one
of a test set (which would mostly be the same template with other numbers). Written are

* mawps_test.jsonl, svamp_test.jsonl: 200 problems each;
* mawps_train.jsonl: the other problems of MAWPS;
* worked.jsonl: the other problems of SVAMP, for the models' preparation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from pathlib import Path

from headwater.tasks.contamination import find_matches, normalise
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.types import Label, Problem

TEST, LARGEST = 200, 100
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def main() -> None:
    """Write the four files, and print how many problems each has."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("mawps", "svamp"):
        arguments.add_argument(f"--{name}", required=True, help="a problem file, or hf:ID[:SPLIT]")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    mawps_test, mawps = _divided(_one_step(load_problems(given.mawps)), TEST)
    svamp_test, svamp = _divided(_one_step(load_problems(given.svamp)), TEST)
    tests = {"mawps": mawps_test, "svamp": svamp_test}
    train = _apart(mawps, tests)
    files = {
        "mawps_test": mawps_test,
        "svamp_test": svamp_test,
        "mawps_train": train,
        "worked": _apart(svamp, {**tests, "train": train}),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        _write(given.out / f"{name}.jsonl", data)


def _place(problem: Problem) -> str:
    return hashlib.sha256(problem.id.encode()).hexdigest()


def _one_step(data: LabelledProblems) -> LabelledProblems:
    """The problems that one operation answers, with it; of equal texts the first."""
    kept: dict[str, tuple[Problem, Label]] = {}
    for problem, label in zip(data.problems, data.labels, strict=True):
        found = list(dict.fromkeys(operations(problem.prompt, label.answer)))
        if len(found) == 1 and all(_is_small(word) for word in found[0].split()[::2]):
            solved = Label(label.problem_id, label.answer, found[0])
            kept.setdefault(normalise(problem.prompt), (problem, solved))
    return LabelledProblems.of((p for p, _ in kept.values()), (x for _, x in kept.values()))


def _is_small(number: str) -> bool:
    return number.isdigit() and int(number) <= LARGEST


def _divided(data: LabelledProblems, first: int) -> tuple[LabelledProblems, LabelledProblems]:
    """So many problems, chosen by their ids alone, and the others."""
    chosen = {p.id for p in sorted(data.problems, key=_place)[:first]}
    return data.only(lambda p: p.id in chosen), data.only(lambda p: p.id not in chosen)


def _apart(data: LabelledProblems, others: dict[str, LabelledProblems]) -> LabelledProblems:
    """Problems without a match, near ones included, in any of the others."""
    matched = {match.train_id for match in find_matches(data, others)}
    return data.only(lambda p: p.id not in matched)


def operations(text: str, answer: str) -> Iterator[str]:
    """Each operation on two numbers of `text` that gives `answer`, as a line of working.

    >>> list(operations("Joan had 70 shells. She has 27 left. How many are gone?", "43"))
    ['70 - 27 = 43']
    """
    try:
        wanted = Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return
    numbers = [found.replace(",", "") for found in _NUMBER.findall(text)]
    for (i, x), (j, y) in permutations(enumerate(numbers), 2):
        a, b = Fraction(x), Fraction(y)
        if i < j and a + b == wanted:
            yield f"{x} + {y} = {answer}"
        if a - b == wanted:
            yield f"{x} - {y} = {answer}"
        if i < j and a * b == wanted:
            yield f"{x} * {y} = {answer}"
        if b and a / b == wanted:
            yield f"{x} / {y} = {answer}"


def _write(path: Path, data: LabelledProblems) -> None:
    rows = [
        {"id": p.id, "problem": p.prompt, "answer": label.answer, "solution": label.solution}
        for p, label in zip(data.problems, data.labels, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    main()
