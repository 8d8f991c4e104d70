"""Files of `{prediction, gold}` rows, for `headwater verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

from headwater.errors import InputError
from headwater.plain_json import parse_json
from headwater.tasks.lines import numbered_lines
from headwater.types import Label
from headwater.verify.describing import explain_grade
from headwater.verify.verifiers import make_verifier

_TEXT_FIELDS = ("prediction", "gold")
_OUR_FIELDS = frozenset({"id", "prediction", "gold", "expected"})


class CaseResult(TypedDict):
    """One row's verdict; `expected` is there where the row says what is right, `steps` (what was
    read and compared, heading -> text) where they were asked for."""

    id: str
    verdict: str
    seconds: float
    how: str
    extracted: str | None
    reward: float
    expected: NotRequired[bool]
    steps: NotRequired[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Case:
    """A prediction to verify; `label` has the gold answer and the rest of the row."""

    id: str
    prediction: str
    label: Label = field(repr=False)
    expected: bool | None = None

    def boxed(self) -> Case:
        r"""The case with its prediction in `\boxed{}`, unless there is a box in it."""
        if "\\boxed" in self.prediction:
            return self
        return replace(self, prediction=f"\\boxed{{{self.prediction}}}")


def read_cases(path: Path) -> list[Case]:
    """Read a .jsonl or .jsonl.gz file of rows {id?, prediction, gold, expected?}.

    A row without an id is called by its line number; further fields are what a reward function
    is given. Raises InputError with file and line for a row that is not of this form, and for a
    file with no rows.
    """
    cases = []
    for number, line in numbered_lines(path):
        place = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:  # also a number of more digits than Python reads
            raise InputError(f"{place}: not JSON ({error}); write one object a line") from None
        cases.append(_case(place, row))
    if not cases:
        raise InputError(f"{path} has no rows; give one {{prediction, gold}} object a line")
    return cases


def run_cases(
    cases: Path | Sequence[tuple[str, str]],
    verifier_name: str = "math",
    *,
    wrap_bare: bool = False,
    workers: int = 1,
    timeout_seconds: float = 2.0,
    explain: bool = False,
) -> list[CaseResult]:
    r"""Return a verdict, its seconds and its reason for every case, in order.

    cases: a file as `read_cases` reads it, or (prediction, gold) pairs. Predictions are taken
    verbatim; `wrap_bare` puts those without any box into `\boxed{}`. explain: say step by step
    what was read and compared. Raises InputError as `read_cases` and `verifiers.make_verifier`.
    """
    if isinstance(cases, Path):
        read = read_cases(cases)
    else:
        rows = enumerate(cases, start=1)
        read = [Case(str(n), text, Label(str(n), gold)) for n, (text, gold) in rows]
    if wrap_bare:
        read = [case.boxed() for case in read]
    with make_verifier(verifier_name, workers=workers, timeout_seconds=timeout_seconds) as verifier:
        grades = verifier.examine([(case.prediction, case.label) for case in read])
    results = []
    for case, grade in zip(read, grades, strict=True):
        result = CaseResult(
            id=case.id,
            verdict=grade.verdict.value,
            seconds=grade.seconds,
            how=grade.how,
            extracted=grade.extracted,
            reward=grade.reward,
        )
        if case.expected is not None:
            result["expected"] = case.expected
        if explain:
            result["steps"] = explain_grade(case.prediction, case.label, grade)
        results.append(result)
    return results


def _case(place: str, row: object) -> Case:
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row is {type(row).__name__}, expected an object")
    for name in _TEXT_FIELDS:
        if name not in row:
            raise InputError(f"{place}: no {name!r}; a row needs {' and '.join(_TEXT_FIELDS)}")
        if not isinstance(row[name], str):
            raise InputError(f"{place}: {name!r} is not text; put it in quotes")
    expected = row.get("expected")
    if expected is not None and not isinstance(expected, bool):
        raise InputError(f"{place}: 'expected' is {expected!r}; use true or false, or drop it")
    number = place.rpartition(":")[2]
    case_id = str(row.get("id", number))
    rest = {name: value for name, value in row.items() if name not in _OUR_FIELDS}
    label = Label(f"{number} {case_id}", row["gold"], row={"answer": row["gold"]} | rest)
    return Case(case_id, row["prediction"], label, expected)
