"""The folder of an evaluation: what it was begun with, what is finished, and its tables.

OUT/settings.json               what decides every number in it
OUT/summary.json                what the latest call found, as --json prints it
OUT/problems.parquet            a row for each model, set and problem of that call
OUT/MODEL/model.json            which files the model is
OUT/MODEL/SET/attempts.parquet  a row for each attempt, once all are made
OUT/MODEL/SET/batches/          those made so far
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater import __version__
from headwater.comparison.candidates import Candidate, digest, read_json, slug, write_json
from headwater.comparison.record import FORMAT, Comparison
from headwater.comparison.settings import EvaluationSettings, ProblemSet
from headwater.errors import InputError
from headwater.evals.answers import ballots
from headwater.evals.batches import write_table
from headwater.evals.scores import majority_of
from headwater.evals.statistics import majority_score
from headwater.types import AttemptTable, Problem, Verdict
from headwater.workflow.confinement import require_own_files
from headwater.workflow.identities import verifier_code
from headwater.workflow.outcome import read_attempts

SETTINGS_FILE, SUMMARY_FILE, PROBLEMS_FILE = "settings.json", "summary.json", "problems.parquet"
_ATTEMPTS_FILE, _HOW_FILE = "attempts.parquet", "how.json"
_CURES = {
    "threads": "set OMP_NUM_THREADS to what it was",
    "rows": "set --rows to what it was",
}
_PROBLEMS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("set", pa.string()),
        ("problem_id", pa.string()),
        ("level", pa.int32()),
        ("subject", pa.string()),
        ("attempts", pa.int32()),
        ("correct", pa.int32()),
        ("majority_answer", pa.string()),
        ("majority_right", pa.float64()),
        ("mean_response_tokens", pa.float64()),
        ("truncated", pa.int32()),
        ("unparseable", pa.int32()),
        ("timeouts", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Attempts:
    """One model's finished attempts at one set: `answers` are those of the table, [Q][A]."""

    table: AttemptTable
    answers: Sequence[Sequence[str | None]]


class EvaluationFolder:
    """The folder `out`, begun or continued with these settings and sets."""

    def __init__(
        self, out: Path, settings: EvaluationSettings, sets: Mapping[str, ProblemSet]
    ) -> None:
        """Raises InputError where the folder was begun with other settings, naming them, and where
        something in it leads out of it."""
        require_own_files(out, ("",))
        self.out = out
        now = decisive(settings, sets)
        path = out / SETTINGS_FILE
        if path.is_file():
            begun = read_json(path)
            _check_same(out, begun, now)
            now["sets"] = begun["sets"] | now["sets"]
        write_json(now, path)

    def model(self, candidate: Candidate) -> Path:
        """The folder of one model."""
        return self.out / candidate.folder_name

    def evaluation(self, candidate: Candidate, set_name: str) -> Path:
        """The folder of one model's evaluation on one set."""
        return self.model(candidate) / set_name

    def is_finished(self, candidate: Candidate, set_name: str) -> bool:
        """Whether every attempt is made."""
        return (self.evaluation(candidate, set_name) / _ATTEMPTS_FILE).is_file()

    def begin(self, candidate: Candidate, set_name: str, how: Mapping[str, Any]) -> Path:
        """The folder of an evaluation that is begun or continued, computed like this.

        Raises InputError where it was begun on another device, in another precision or with
        another number of threads: the bits could differ.
        """
        folder = self.evaluation(candidate, set_name)
        path = folder / _HOW_FILE
        begun = read_json(path) if path.is_file() else dict(how)
        for key, value in how.items():
            if begun.get(key) != value:
                raise InputError(
                    f"{folder} was begun with {key} {begun.get(key)}, and now it is {value}; "
                    f"{_CURES.get(key, 'set it back')}, or give --out another folder"
                )
        write_json(begun, path)
        return folder

    def how(self, candidate: Candidate, set_name: str) -> dict[str, Any]:
        """How an evaluation was computed: device, precision, threads, rows."""
        found: dict[str, Any] = read_json(self.evaluation(candidate, set_name) / _HOW_FILE)
        return found

    def attempts(self, candidate: Candidate, set_name: str, seed: int) -> Attempts:
        """The finished attempts of one model at one set."""
        path = self.evaluation(candidate, set_name) / _ATTEMPTS_FILE
        table = read_attempts([path], (seed,))
        answers = pq.read_table(path, columns=["answer"])["answer"].to_pylist()
        each = table.response_tokens.shape[2]
        return Attempts(table, [answers[n : n + each] for n in range(0, len(answers), each)])

    def write(
        self,
        found: Comparison,
        sets: Mapping[str, ProblemSet],
        attempts: Mapping[tuple[str, str], Attempts],
    ) -> None:
        """Write the summary and the table of problems; attempts by (model, set)."""
        rows = [
            row
            for (model, name), one in attempts.items()
            for row in _problem_rows(model, name, sets[name].data.problems, one)
        ]
        write_table(pa.Table.from_pylist(rows, _PROBLEMS_SCHEMA), self.out / PROBLEMS_FILE)
        write_json(found.as_dict(), self.out / SUMMARY_FILE)


def versions() -> dict[str, str]:
    """Of what decides numbers."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"headwater": __version__} | libraries


def decisive(settings: EvaluationSettings, sets: Mapping[str, ProblemSet]) -> dict[str, Any]:
    """Everything that decides the numbers of an evaluation, but for its models."""
    plain = settings.model_dump(mode="json", exclude={"problems", "limit"})
    code = verifier_code(settings.verifier)
    return {
        "format": FORMAT,
        **plain,
        **({} if code is None else {"verifier_code": code}),
        **versions(),
        "sets": {
            name: {"source": one.source, "sha256": one.data.data_hash, "problems": len(one.data)}
            for name, one in sets.items()
        },
    }


def default_folder(
    models: Sequence[Candidate], settings: EvaluationSettings, sets: Mapping[str, ProblemSet]
) -> Path:
    """runs/eval/MODEL-SET-HASH: the same for the same models, sets and settings."""
    hashed = digest([decisive(settings, sets), [one.key for one in models]])[:8]
    named = [slug(models[0].name), next(iter(sets))]
    counts = (len(models), len(sets))
    words = [
        f"{name}+{count - 1}" if count > 1 else name
        for name, count in zip(named, counts, strict=True)
    ]
    return Path("runs") / "eval" / "-".join([*words, hashed])


def _check_same(out: Path, begun: Any, now: Mapping[str, Any]) -> None:
    """Raise InputError unless a folder that was begun so may be continued so."""
    if not isinstance(begun, dict) or begun.get("format") != FORMAT or "sets" not in begun:
        raise InputError(
            f"{out / SETTINGS_FILE} is not that of an evaluation of this version; give --out "
            "another folder"
        )
    old, new = _flat(begun), _flat(now)
    # A set may be new, or left out this time.
    keys = [key for key in old | new if not key.startswith("sets.") or (key in old and key in new)]
    differing = [
        f"{key} was {old.get(key)} and is {new.get(key)}"
        for key in keys
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise InputError(
            f"{out} holds an evaluation with other settings: {'; '.join(differing)}; give --out "
            "another folder, or the settings it was begun with"
        )


def _flat(plain: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A nested mapping as one of `a.b.c` -> value; where a set lies may change, not what it is."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{where}{key}.")
        elif not (where.startswith("sets.") and key == "source"):
            found[f"{where}{key}"] = value
    return found


def _problem_rows(
    model: str, set_name: str, problems: Sequence[Problem], attempts: Attempts
) -> list[dict[str, Any]]:
    table = attempts.table
    assert table.votes is not None
    verdicts_QA = table.verdicts[0]
    rows = []
    for place, (problem, votes_A) in enumerate(zip(problems, ballots(table.votes[0]), strict=True)):
        chosen = majority_of(votes_A)
        correct_A, verdicts_A = table.correct[0][place], verdicts_QA[place]
        rows.append(
            {
                "model": model,
                "set": set_name,
                "problem_id": problem.id,
                "level": problem.level,
                "subject": problem.subject,
                "attempts": len(votes_A),
                "correct": int(correct_A.sum()),
                "majority_answer": None if chosen is None else attempts.answers[place][chosen],
                "majority_right": majority_score(votes_A, correct_A),
                "mean_response_tokens": float(table.response_tokens[0][place].mean()),
                "truncated": int(table.truncated[0][place].sum()),
                "unparseable": int(np.sum(verdicts_A == Verdict.UNPARSEABLE.value)),
                "timeouts": int(np.sum(verdicts_A == Verdict.TIMEOUT.value)),
            }
        )
    return rows
