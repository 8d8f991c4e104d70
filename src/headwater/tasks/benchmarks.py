"""Well-known evaluation sets by name: where each lies on the hub, and how large it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from headwater.tasks.hub import hub_parts


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published evaluation set.

    source: its hub dataset with config and split. problems: how many it has. columns: our field
    name -> theirs, where its rows are of no known shape. title: as papers call it.
    """

    name: str
    title: str
    source: str
    problems: int
    columns: Mapping[str, str] = field(default_factory=dict)


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        one.name: one
        for one in (
            Benchmark("gsm8k", "GSM8K", "hf:openai/gsm8k:main:test", 1319),
            Benchmark("math500", "MATH-500", "hf:HuggingFaceH4/MATH-500:test", 500),
            Benchmark("aime24", "AIME 2024", "hf:HuggingFaceH4/aime_2024:train", 30),
            Benchmark("aime25", "AIME 2025", "hf:math-ai/aime25:test", 30),
            Benchmark(
                "amc23",
                "AMC 2023",
                "hf:math-ai/amc23:test",
                40,
                # A question without worked solution: GSM8K's columns, but not its shape.
                MappingProxyType({"problem": "question", "answer": "answer"}),
            ),
        )
    }
)


def benchmark_names() -> str:
    """The names, for messages.

    >>> benchmark_names()
    'gsm8k, math500, aime24, aime25, amc23'
    """
    return ", ".join(BENCHMARKS)


def known_size(source: str) -> int | None:
    """Problems of a benchmark, given by name or as the hub dataset of whichever owner.

    >>> known_size("aime24"), known_size("hf:HuggingFaceH4/aime_2024:train"), known_size("hf:a/b")
    (30, 30, None)
    """
    if source in BENCHMARKS:
        return BENCHMARKS[source].problems
    name = hub_parts(source)[0].rpartition("/")[2]
    # aime_2024 and MATH-500 are the names aime24 and math500 in another spelling
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    short = re.sub(r"(?<=[a-z])20(?=\d\d$)", "", key)
    known = BENCHMARKS.get(short)
    return None if known is None else known.problems
