"""Whether a ledger can be believed: its own arithmetic, and stages' closing statements.

A published stage carries a statement of what its account came to. A ledger that was lost, replaced
or cut short is told by it, and what the stage spent is taken from it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headwater.errors import InputError
from headwater.ledger.ledger import Kind, Ledger
from headwater.ledger.spending import COUNTERS


@dataclass(frozen=True, slots=True)
class Statement:
    """One account as its stage was published: totals of its live entries, and labels read, sorted.

    peak_memory_bytes is the largest observed.
    """

    totals: Mapping[str, float]
    labels: tuple[str, ...]
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Statement:
        """From what `as_dict` gave. Raises KeyError or TypeError for anything else."""
        totals = {name: plain["totals"][name] for name in COUNTERS}
        return cls(totals, tuple(plain["labels"]), plain["peak_memory_bytes"])


def closing_statement(ledger: Ledger, stage: str, kind: Kind) -> Statement | None:
    """What the account of a stage comes to; None where it has none."""
    with ledger._snapshot() as db:
        row = db.execute(
            f"SELECT id, peak_memory_bytes, {', '.join(COUNTERS)} FROM accounts "
            "WHERE stage = ? AND kind = ?",
            (stage, kind),
        ).fetchone()
        if row is None:
            return None
        labels = db.execute(
            "SELECT problem FROM labels WHERE account = ? AND first_seq IS NOT NULL "
            "ORDER BY problem",
            (row[0],),
        ).fetchall()
    totals = dict(zip(COUNTERS, row[2:], strict=True))
    return Statement(totals, tuple(problem for (problem,) in labels), row[1])


def restore(ledger: Ledger, stage: str, kind: Kind, statement: Statement) -> None:
    """Make the account of a published stage come to its statement: one live entry, its labels.

    Work that was done again is kept as it is; what a lost ledger knew of it is lost.
    """
    account = ledger.account(stage, kind)
    with ledger._transaction() as db:
        (account_id,) = db.execute(
            "SELECT id FROM accounts WHERE stage = ? AND kind = ?", (account.stage, account.kind)
        ).fetchone()
        db.execute("DELETE FROM entries WHERE account = ? AND state = 'live'", (account_id,))
        db.execute("DELETE FROM labels WHERE account = ?", (account_id,))
        values = [statement.totals[name] for name in COUNTERS]
        db.execute(
            f"INSERT INTO entries (account, seq, state, {', '.join(COUNTERS)}) "
            f"VALUES (?, 1, 'live'{', ?' * len(COUNTERS)})",
            (account_id, *values),
        )
        db.execute(
            f"UPDATE accounts SET {', '.join(f'{name} = ?' for name in COUNTERS)}, "
            "peak_memory_bytes = MAX(peak_memory_bytes, ?) WHERE id = ?",
            (*values, statement.peak_memory_bytes, account_id),
        )
        db.executemany(
            "INSERT INTO labels (account, problem, first_seq) VALUES (?, ?, 1)",
            [(account_id, problem) for problem in statement.labels],
        )


def check_ledger(ledger: Ledger) -> None:
    """Whether the file is sound: its pages, its indexes, and every total the sum of its entries.

    Not vouched for are the amounts of work that was done again, and peak memory. Raises InputError
    with the cure.
    """
    try:
        with ledger._snapshot() as db:
            found = _damage(db)
    except sqlite3.Error as error:
        found = str(error)
    if found is not None:
        raise damaged(ledger, found)


def damaged(ledger: Ledger, found: str) -> InputError:
    """The error for a ledger with such damage."""
    name = ledger.path.name
    return InputError(
        f"{ledger.path} is damaged ({found}); expected a sound ledger: put a copy of it back, or "
        f"move {name}, {name}-wal and {name}-shm away and run again: what finished stages spent is "
        "then taken from their artifacts"
    )


def _damage(db: sqlite3.Connection) -> str | None:
    """The first thing that is wrong, or None."""
    (said, *_) = (row[0] for row in db.execute("PRAGMA integrity_check(1)"))
    if said != "ok":
        return str(said)
    if db.execute("PRAGMA foreign_key_check").fetchone() is not None:
        return "an entry of no account"
    totals: dict[int, list[float]] = {}
    lengths: dict[int, int] = {}
    rows = db.execute(
        f"SELECT account, seq, state, {', '.join(COUNTERS)} FROM entries ORDER BY account, seq"
    )
    for account, seq, state, *amounts in rows:
        if state not in ("live", "replayed", "refused"):
            return f"an entry in state {state!r}"
        if state == "live":
            lengths[account] = lengths.get(account, 0) + 1
            if seq != lengths[account]:
                return f"entry {seq} of an account follows entry {lengths[account] - 1}"
            before = totals.get(account, [0] * len(COUNTERS))
            totals[account] = [a + b for a, b in zip(before, amounts, strict=True)]
    for account, stage, kind, *amounts in db.execute(
        f"SELECT id, stage, kind, {', '.join(COUNTERS)} FROM accounts"
    ):
        if kind not in ("train", "eval"):
            return f"an account of kind {kind!r}"
        if amounts != totals.get(account, [0] * len(COUNTERS)):
            return f"the total of stage {stage} is not the sum of its entries"
    for account, problem, seq in db.execute(
        "SELECT account, problem, first_seq FROM labels WHERE first_seq IS NOT NULL"
    ):
        if not 1 <= seq <= lengths.get(account, 0):
            return f"label {problem!r} was read by entry {seq}, which does not exist"
    return None
