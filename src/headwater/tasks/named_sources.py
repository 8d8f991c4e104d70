"""Names of problem sources: `NAME=SOURCE`, or the short name of the source itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

from headwater.errors import InputError
from headwater.tasks.benchmarks import BENCHMARKS
from headwater.tasks.problems import is_generated
from headwater.tasks.rows import source_name

#: What may stand before the first `=` of NAME=VALUE: no path separators, no colons.
NAME = re.compile(r"[A-Za-z0-9][\w .+-]*")


def named_sources(given: Iterable[str]) -> dict[str, str]:
    """`NAME=SOURCE` or `SOURCE` as name -> source. Raises InputError for a name given twice.

    >>> named_sources(["gsm8k", "mine=data/test.jsonl", "hf:math-ai/amc23:test"])
    {'gsm8k': 'gsm8k', 'mine': 'data/test.jsonl', 'amc23-test': 'hf:math-ai/amc23:test'}
    """
    found: dict[str, str] = {}
    for text in given:
        name, source = split_name(text)
        name = name or default_name(source)
        if name in found:
            raise InputError(f"{name} is given twice; name the sets apart: NAME={source}")
        found[name] = source
    return found


def split_name(text: str) -> tuple[str | None, str]:
    """(name, value) of `NAME=VALUE`; the name is None where there is none.

    >>> split_name("mine=a/b.jsonl"), split_name("task:arithmetic?count=5")
    (('mine', 'a/b.jsonl'), (None, 'task:arithmetic?count=5'))
    """
    name, equals, value = text.partition("=")
    return (name, value) if equals and value and NAME.fullmatch(name) else (None, text)


def default_name(source: str) -> str:
    """How a set is called unless it is given a name.

    >>> default_name("gsm8k"), default_name("data/gsm8k_test.jsonl"), default_name("task:sums?a=1")
    ('gsm8k', 'gsm8k_test', 'sums')
    """
    if source in BENCHMARKS:
        return source
    if is_generated(source):
        return source.partition("?")[0].partition(":")[2]
    return source_name(source)
