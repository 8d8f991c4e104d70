"""What data a run folder was made of, and whether it still is: kept in its `run.json`.

Artifacts of the old content of a file and of the new one would stand side by side in one report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.plain_json import read_json_file
from headwater.storage import unsealed
from headwater.tasks.problems import LabelledProblems

_SHOWN_HASH = 12
_FACTS = {"key", "source", "columns", "whole_rows", "rows", "bytes", "sha256"}


@dataclass(frozen=True)
class ReadSource:
    """A source of a recipe as it was read.

    key: where the recipe names it, such as "task.train" or "task.eval.held_out". columns,
    whole_rows: how it was read, which shows in the hash as the content does. bytes: size of a
    file on this disk when it was read; None for any other source.
    """

    key: str
    source: str
    data: LabelledProblems = field(repr=False)
    columns: Mapping[str, str] = field(default_factory=dict)
    whole_rows: bool = False
    bytes: int | None = None

    def facts(self) -> dict[str, Any]:
        """What the record keeps."""
        return {
            "key": self.key,
            "source": self.source,
            "columns": dict(self.columns),
            "whole_rows": self.whole_rows,
            "rows": len(self.data),
            "bytes": self.bytes,
            "sha256": self.data.data_hash,
        }


def file_bytes(source: str) -> int | None:
    """Size of the file a source names; None where it names none on this disk."""
    path = Path(source).expanduser()
    return path.stat().st_size if path.is_file() else None


def unchanged_data(sources: Iterable[ReadSource], record: Path) -> tuple[Mapping[str, Any], ...]:
    """The facts a run's `record` is to hold: those of `sources`, and of others it held before.

    A record that is missing, cannot be read or is older than these facts holds none. Raises
    InputError for sources that the record names, read in the same way, with other content.
    """
    before = {_name(facts): facts for facts in _recorded(record)}
    now = {_name(facts): facts for facts in (source.facts() for source in sources)}
    changed = [
        f"{facts['key']}: {facts['source']} had {_content(before[name])} when {record.parent} was "
        f"begun, and now has {_content(facts)}"
        for name, facts in now.items()
        if name in before and before[name]["sha256"] != facts["sha256"]
    ]
    if changed:
        raise InputError(
            "\n".join(changed) + "; restore it as it was, or give --out another folder to run on "
            "the new content"
        )
    return tuple((before | now).values())


def _recorded(record: Path) -> list[dict[str, Any]]:
    try:
        found = unsealed(read_json_file(record)).get("data", [])
    except (OSError, ValueError):  # run.json is about to be written anew
        return []
    return [one for one in found if isinstance(one, dict) and one.keys() >= _FACTS]


def _name(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two sources the same one: where it is named, what, and how it is read."""
    return (
        facts["key"],
        facts["source"],
        str(sorted(facts["columns"].items())),
        facts["whole_rows"],
    )


def _content(facts: Mapping[str, Any]) -> str:
    size = "" if facts["bytes"] is None else f"{facts['bytes']:,} bytes, "
    return f"{facts['rows']:,} rows ({size}sha256 {facts['sha256'][:_SHOWN_HASH]})"
