"""Stand-ins for problems that cannot be read: as many as there would be, for planning only."""

from __future__ import annotations

from headwater.tasks.benchmarks import known_size
from headwater.tasks.problems import LabelledProblems
from headwater.types import Label, Problem

_USUAL_SIZE = 500


def evaluation_size(source: str, asked: int | None = None) -> int:
    """How many problems to plan for in an evaluation set, named or on the hub, that cannot be read.

    asked: the recipe's `evaluation.problems`, believed for sets of unknown size.

    >>> evaluation_size("hf:HuggingFaceH4/aime_2024:train"), evaluation_size("hf:some/set", 64)
    (30, 64)
    """
    return known_size(source) or asked or _USUAL_SIZE


def stand_ins(source: str, count: int) -> LabelledProblems:
    """`count` different problems in the place of those of `source`, all with worked solutions."""
    ids = [f"stand-in-{number}" for number in range(count)]
    return LabelledProblems.of(
        (Problem(id_, f"{id_} of {source}", source) for id_ in ids),
        (Label(id_, "0", "stand-in") for id_ in ids),
    )
