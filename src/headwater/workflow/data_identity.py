"""What names the data of a study, so that a stage on other data is another stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headwater.types import Label, Problem
from headwater.workflow.digests import digest_rows


@dataclass(frozen=True, slots=True)
class DataIdentity:
    """Hashes of a pool or evaluation set: what is asked, and what is the answer.

    sources: of each source of its problems, the hash of which these are.
    """

    problems: str
    labels: str
    size: int
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphData:
    """Identities of every pool and every evaluation set, by name.

    verifier_code, source_files: hashes of what lies behind a verifier's or a source's name.
    """

    pools: Mapping[str, DataIdentity]
    evals: Mapping[str, DataIdentity]
    verifier_code: str | None = None
    source_files: Mapping[str, str] = field(default_factory=dict)


def identify(problems: Sequence[Problem], labels: Sequence[Label]) -> DataIdentity:
    """Identity of a set of problems: order counts, since steps draw problems by position."""
    asked = ([p.id, p.prompt, p.level, p.subject, *p.before] for p in problems)
    answers = (
        [label.problem_id, label.answer, label.solution, *([label.row] if label.row else [])]
        for label in labels
    )
    ids: dict[str, list[list[str]]] = {}
    for problem in problems:
        ids.setdefault(problem.source, []).append([problem.id])
    sources = {source: digest_rows(rows) for source, rows in ids.items()}
    return DataIdentity(digest_rows(asked), digest_rows(answers), len(problems), sources)
