"""What a stage warns of while it trains, and the file of its artifact that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from headwater.errors import InputError
from headwater.plain_json import read_json_file
from headwater.storage import write_whole

ALERTS_FILE = "alerts.json"


@dataclass(frozen=True, slots=True)
class Alert:
    """One warning of one stage.

    guard: what speaks, a setting under `guards` or "out_of_memory". quantity: the metric, or the
    limit that was lowered. step counts from 1, as the terminal does. value: what was found, beyond
    `threshold`. seen, causes and cures are clauses without a full stop.
    """

    guard: str
    quantity: str
    step: int
    value: float
    threshold: float
    seen: str
    causes: str
    cures: str

    @property
    def words(self) -> str:
        """All of it for a person, on one line."""
        return f"{self.seen}. Likely causes: {self.causes}. Try: {self.cures}"


def write_alerts(alerts: Iterable[Alert], folder: Path) -> None:
    """Write FOLDER/alerts.json; a stage without an alert has no such file."""
    plain = [asdict(alert) for alert in alerts]
    if plain:
        write_whole(folder / ALERTS_FILE, json.dumps(plain, indent=1) + "\n")
    else:  # of an attempt that was cut off while it published
        (folder / ALERTS_FILE).unlink(missing_ok=True)


def read_alerts(folder: Path) -> tuple[Alert, ...]:
    """The alerts of an artifact, none where it has no file of them.

    Raises InputError for a file that cannot be read.
    """
    path = folder / ALERTS_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(Alert(**plain) for plain in read_json_file(path))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} holds no alerts ({error}), expected a list of them as a stage writes it; "
            "remove this artifact and run again"
        ) from error
