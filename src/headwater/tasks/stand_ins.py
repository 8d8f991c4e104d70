"""Stand-ins for problems that cannot be read: as many as there would be, for planning only."""

from __future__ import annotations

import re

from headwater.tasks.hub import hub_parts
from headwater.tasks.problems import LabelledProblems
from headwater.types import Label, Problem

#: Problems of well-known evaluation sets, by what is left of their ids in lower case.
_KNOWN_SIZES = {
    "math500": 500,
    "aime24": 30,
    "aime2024": 30,
    "aime25": 30,
    "aime2025": 30,
    "amc23": 40,
    "gsm8k": 1319,  # its test split
}
_USUAL_SIZE = 500


def evaluation_size(source: str, asked: int | None = None) -> int:
    """How many problems to plan for in an evaluation set on the hub that cannot be read.

    asked: the recipe's `evaluation.problems`, believed for sets of unknown size.

    >>> evaluation_size("hf:HuggingFaceH4/aime_2024:train"), evaluation_size("hf:some/set", 64)
    (30, 64)
    """
    name = hub_parts(source)[0].rpartition("/")[2].lower()
    known = _KNOWN_SIZES.get(re.sub(r"[^a-z0-9]", "", name))
    return known or asked or _USUAL_SIZE


def stand_ins(source: str, count: int) -> LabelledProblems:
    """`count` different problems in the place of those of `source`, all with worked solutions."""
    ids = [f"stand-in-{number}" for number in range(count)]
    return LabelledProblems.of(
        (Problem(id_, f"{id_} of {source}", source) for id_ in ids),
        (Label(id_, "0", "stand-in") for id_ in ids),
    )
