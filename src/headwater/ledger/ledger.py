"""The run's account book: who spent what, in one SQLite file, exact through kills and resumes.

Each stage (named by its artifact fingerprint) has an account for training and one for
evaluation. An account is a list of entries numbered 1, 2, 3, ...; its length is its
position, which a checkpoint saves. A resumed stage rewinds to that position: the entries
after it are kept as `replayed`, and the work is charged again when it is done again.
Logical spending counts live entries (what a result took), physical spending counts all
(what the machines did). Accounts carry the totals of their live entries, so that a budget
is checked by reading one row per stage, however long the run.

One local file serves several processes and threads: every write is one immediate
transaction on a write-ahead log, flushed to disk before it returns. The log needs shared
memory, so the file must not lie on a network file system used from two machines.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from headwater.errors import BudgetExhausted, InputError, StageError
from headwater.ledger.database import open_database, told
from headwater.ledger.spending import (
    COUNTERS,
    INTEGER_COUNTERS,
    LIMITABLE,
    Spending,
    checked_amount,
)

Kind = Literal["train", "eval"]

_LIVE, _REPLAYED, _REFUSED = "live", "replayed", "refused"


class Ledger:
    """Accounts of all stages of one run, and the budget over their training spending.

    path: the SQLite file, made if missing. limits: counter name or "labels" -> the largest
    logical training spending allowed over `stages` (None: all of the file's). A folder may hold
    stages of an earlier recipe, which are not the budget's concern; a stage that is not among
    `stages` has no limit. Raises InputError for an unknown or negative limit and for a file that
    is not a ledger of this version.
    """

    def __init__(
        self,
        path: Path,
        limits: Mapping[str, float] | None = None,
        stages: Iterable[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.limits = dict(limits or {})
        self.stages = None if stages is None else frozenset(stages)
        for name, limit in self.limits.items():
            if name not in LIMITABLE:
                raise InputError(
                    f"budget {name!r} is not counted; use one of {', '.join(LIMITABLE)}"
                )
            if not limit >= 0:
                raise InputError(f"budget {name}={limit} is negative; set it to 0 or more")
        self.budgeted: tuple[int, str] | None = None  # newest account, ids of the budgeted ones
        self._connections = threading.local()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection()

    def account(self, stage: str, kind: Kind = "train") -> Account:
        """The account of `stage` (its artifact fingerprint), opened when new."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO accounts (stage, kind) VALUES (?, ?)", (stage, kind))
            (account_id,) = db.execute(
                "SELECT id FROM accounts WHERE stage = ? AND kind = ?", (stage, kind)
            ).fetchone()
        return Account(self, account_id, stage, kind)

    def spending(self, stages: Iterable[str] | None = None, kind: Kind = "train") -> Spending:
        """Logical spending of `stages` (None: all): live entries only, labels counted once.

        A stage that never spent counts as nothing.
        """
        with self._snapshot() as db:
            return self._total(db, _account_ids(db, stages, kind), physical=False)

    def physical(self, kind: Kind = "train", stages: Iterable[str] | None = None) -> Spending:
        """Everything that was done for `stages` (None: all), replayed and refused work included."""
        with self._snapshot() as db:
            return self._total(db, _account_ids(db, stages, kind), physical=True)

    def without_account(self, stages: Iterable[str]) -> tuple[str, ...]:
        """Those of `stages` that never opened an account here: what they spent is not known."""
        with self._snapshot() as db:
            known = {stage for (stage,) in db.execute("SELECT stage FROM accounts")}
        return tuple(stage for stage in stages if stage not in known)

    def close(self) -> None:
        """Close this thread's connection; the ledger opens another when it is used again."""
        held = getattr(self._connections, "held", None)
        if held is not None and held[0] == os.getpid():
            held[1].close()
            self._connections.held = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Ledger], tuple[Any, ...]]:
        return Ledger, (self.path, self.limits, self.stages)

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection; a forked child opens its own and leaves its parent's be."""
        held = getattr(self._connections, "held", None)
        if held is None or held[0] != os.getpid():
            if held is not None:
                _INHERITED.append(held[1])
            held = (os.getpid(), open_database(self.path))
            self._connections.held = held
        return held[1]

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A consistent view for several reads."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """All or nothing: commits when the block ends, rolls back when it raises."""
        db = self._connection()
        try:
            db.execute(begin)
            yield db
            db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise  # a defect of the caller's, not of the file
            raise told(error, self.path) from error
        finally:
            with suppress(sqlite3.ProgrammingError):  # closed by one who was interrupted in here
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _total(self, db: sqlite3.Connection, account_ids: list[int], physical: bool) -> Spending:
        ids = json.dumps(account_ids)
        names = ", ".join(COUNTERS)
        chosen = "IN (SELECT value FROM json_each(?))"
        rows = db.execute(
            f"SELECT {names}, peak_memory_bytes FROM accounts WHERE id {chosen}", (ids,)
        ).fetchall()
        peak = max((row[-1] for row in rows), default=0)
        charged = [row[:-1] for row in rows]
        if physical:
            charged += db.execute(
                f"SELECT {names} FROM entries WHERE state <> 'live' AND account {chosen}", (ids,)
            ).fetchall()
        (labels,) = db.execute(
            f"SELECT COUNT(DISTINCT problem) FROM labels WHERE account {chosen}"
            + ("" if physical else " AND first_seq IS NOT NULL"),
            (ids,),
        ).fetchone()
        columns = list(zip(*charged, strict=True)) or [()] * len(COUNTERS)
        totals: dict[str, Any] = {
            name: _add(name, column) for name, column in zip(COUNTERS, columns, strict=True)
        }
        return Spending(labels=labels, peak_memory_bytes=peak, **totals)


class Account:
    """One stage's account, training or evaluation. Made by `Ledger.account`."""

    def __init__(self, ledger: Ledger, account_id: int, stage: str, kind: Kind) -> None:
        self._ledger = ledger
        self._id = account_id
        self.stage = stage
        self.kind = kind

    def read_labels(self, problem_ids: Sequence[str], verifier_calls_each: int = 1) -> int:
        """Charge the reading of gold answers, in order, as far as the budget goes.

        Each id (repeats allowed) costs `verifier_calls_each` verifier calls, and one label
        where no stage of the run has read it yet. Returns how many ids were charged: fewer
        than given when the next would pass a budget. The charge is on disk on return, so
        that the answers can be read after it. Raises InputError for a negative price.
        """
        if verifier_calls_each < 0:
            raise InputError(f"verifier_calls_each={verifier_calls_each}; expected 0 or more")
        with self._ledger._transaction() as db:
            granted = self._affordable(db, problem_ids, verifier_calls_each)
            if granted:
                amounts = {"verifier_calls": granted * verifier_calls_each}
                seq = self._append(db, amounts, _LIVE)
                db.executemany(
                    "INSERT INTO labels (account, problem, first_seq) VALUES (?, ?, ?) "
                    "ON CONFLICT (account, problem) DO UPDATE SET first_seq = excluded.first_seq "
                    "WHERE first_seq IS NULL",
                    [(self._id, problem, seq) for problem in dict.fromkeys(problem_ids[:granted])],
                )
        return granted

    def charge(self, **amounts: float) -> None:
        """Charge work that was done: any of COUNTERS but verifier_calls, as one entry.

        Raises BudgetExhausted when the entry would carry the run past a limit: nothing of it
        then counts as logical spending, which stays at or below the limit; the work done is
        kept as physical, and its result is to be dropped. Raises InputError for a counter that
        does not exist, a negative or (for all but flops and seconds) fractional amount.
        """
        charged = {name: checked_amount(name, amount) for name, amount in amounts.items()}
        with self._ledger._transaction() as db:
            passed = [name for name in charged if charged[name] > self._room(db, name)]
            self._append(db, charged, _REFUSED if passed else _LIVE)
        if passed:
            name = passed[0]
            raise BudgetExhausted(
                f"another {charged[name]:.15g} {name} would pass the budget of "
                f"{self._limit(name):.15g}; raise budget.{name} and run again to continue"
            )

    def remaining(self, counter: str) -> float:
        """What the budget still allows of `counter` (or "labels"); infinity without a limit.

        Raises InputError for a name that is not counted.
        """
        if counter not in LIMITABLE:
            raise InputError(f"{counter!r} is not counted; use one of {', '.join(LIMITABLE)}")
        with self._ledger._snapshot() as db:
            return max(0.0, self._room(db, counter))

    def observe_peak_memory(self, bytes_: int) -> None:
        """Keep the largest memory use seen, in bytes; rewinding does not lower it."""
        with self._ledger._transaction() as db:
            db.execute(
                "UPDATE accounts SET peak_memory_bytes = MAX(peak_memory_bytes, ?) WHERE id = ?",
                (int(bytes_), self._id),
            )

    def position(self) -> int:
        """Number of live entries; what a checkpoint saves and `rewind` takes."""
        with self._ledger._snapshot() as db:
            return self._position(db)

    def rewind(self, position: int) -> None:
        """Mark the entries after `position` as replayed: they no longer count as logical.

        0 starts the stage's account afresh. Raises StageError when the account is shorter
        than `position`, that is, when the checkpoint and the ledger are not of one run.
        """
        with self._ledger._transaction() as db:
            length = self._position(db)
            if not 0 <= position <= length:
                raise StageError(
                    f"checkpoint of stage {self.stage} is at ledger position {position}, but "
                    f"{self._ledger.path} has {length} entries of it; they are not of the same "
                    "run: restore the ledger, or delete the stage's checkpoint to start it again"
                )
            db.execute(
                "UPDATE entries SET state = ? WHERE account = ? AND seq > ? AND state = 'live'",
                (_REPLAYED, self._id, position),
            )
            db.execute(
                "UPDATE labels SET first_seq = NULL WHERE account = ? AND first_seq > ?",
                (self._id, position),
            )
            self._recount(db)

    def _recount(self, db: sqlite3.Connection) -> None:
        """Totals from the live entries, added one by one in order as `_append` adds them, so
        that a rewound account has the bits of one that never went further."""
        totals: list[float] = [0] * len(COUNTERS)
        for row in db.execute(
            f"SELECT {', '.join(COUNTERS)} FROM entries "
            "WHERE account = ? AND state = 'live' ORDER BY seq",
            (self._id,),
        ):
            totals = [total + amount for total, amount in zip(totals, row, strict=True)]
        columns = ", ".join(f"{name} = ?" for name in COUNTERS)
        db.execute(f"UPDATE accounts SET {columns} WHERE id = ?", (*totals, self._id))

    def _append(self, db: sqlite3.Connection, amounts: Mapping[str, float], state: str) -> int:
        """Write one entry and, when live, add it to the totals; returns its number."""
        seq = self._position(db) + 1
        names = list(amounts)
        columns = "".join(f", {name}" for name in names)
        marks = ", ?" * len(names)
        values = list(amounts.values())
        db.execute(
            f"INSERT INTO entries (account, seq, state{columns}) VALUES (?, ?, ?{marks})",
            (self._id, seq, state, *values),
        )
        if state == _LIVE and names:
            added = ", ".join(f"{name} = {name} + ?" for name in names)
            db.execute(f"UPDATE accounts SET {added} WHERE id = ?", (*values, self._id))
        return seq

    def _affordable(self, db: sqlite3.Connection, problem_ids: Sequence[str], price: int) -> int:
        """How many of `problem_ids`, from the first on, the budget allows."""
        granted = len(problem_ids)
        if price:
            granted = int(min(granted, max(0, self._room(db, "verifier_calls")) // price))
        if self._limit("labels") is None:
            return granted
        known = {
            problem
            for (problem,) in db.execute(
                "SELECT DISTINCT problem FROM labels WHERE first_seq IS NOT NULL "
                "AND problem IN (SELECT value FROM json_each(?)) "
                "AND account IN (SELECT value FROM json_each(?))",
                (json.dumps(list(dict.fromkeys(problem_ids[:granted]))), self._budgeted(db)),
            )
        }
        room = None
        for index, problem in enumerate(problem_ids[:granted]):
            if problem in known:
                continue
            if room is None:  # counting all labels is the costly part: only when one is new
                room = self._room(db, "labels")
            if room < 1:
                return index
            room -= 1
            known.add(problem)
        return granted

    def _limit(self, name: str) -> float | None:
        """The run's limit on `name`; evaluation and stages outside the budget have none."""
        stages = self._ledger.stages
        limited = self.kind == "train" and (stages is None or self.stage in stages)
        return self._ledger.limits.get(name) if limited else None

    def _room(self, db: sqlite3.Connection, name: str) -> float:
        """Limit minus the budgeted stages' logical spending; negative after a limit is lowered."""
        limit = self._limit(name)
        if limit is None:
            return math.inf
        budgeted, chosen = (self._budgeted(db),), "IN (SELECT value FROM json_each(?))"
        if name == "labels":
            (spent,) = db.execute(
                "SELECT COUNT(DISTINCT problem) FROM labels WHERE first_seq IS NOT NULL "
                f"AND account {chosen}",
                budgeted,
            ).fetchone()
            return limit - spent
        rows = db.execute(f"SELECT {name} FROM accounts WHERE id {chosen}", budgeted)
        return limit - _add(name, (total for (total,) in rows))

    def _budgeted(self, db: sqlite3.Connection) -> str:
        """Ids of the accounts that the budget is over, as a JSON list.

        Accounts are opened and never removed: the list is made anew when there is a newer one.
        """
        (newest,) = db.execute("SELECT MAX(id) FROM accounts").fetchone()
        if self._ledger.budgeted is None or self._ledger.budgeted[0] != newest:
            ids = _account_ids(db, self._ledger.stages, "train")
            self._ledger.budgeted = (newest, json.dumps(ids))
        return self._ledger.budgeted[1]

    def _position(self, db: sqlite3.Connection) -> int:
        (position,) = db.execute(
            "SELECT MAX(seq) FROM entries WHERE account = ? AND state = 'live'", (self._id,)
        ).fetchone()
        return position or 0


# Connections of a parent process, seen from a forked child: SQLite forbids both using and
# closing them there, so they are kept from the garbage collector.
_INHERITED: list[sqlite3.Connection] = []


def _add(name: str, amounts: Iterable[float]) -> float:
    """Sum of one counter's column: exact for integers, and for the others correctly rounded,
    so that the order in which stages ran does not show in the last bit."""
    return sum(amounts) if name in INTEGER_COUNTERS else math.fsum(amounts)


def _account_ids(db: sqlite3.Connection, stages: Iterable[str] | None, kind: Kind) -> list[int]:
    if isinstance(stages, str):
        raise InputError(f"stages={stages!r} is one string; pass a list of fingerprints")
    if stages is None:
        rows = db.execute("SELECT id FROM accounts WHERE kind = ?", (kind,))
    else:  # found by their index: an outcome asks for every stage by itself
        rows = db.execute(
            "SELECT id FROM accounts WHERE kind = ? AND stage IN (SELECT value FROM json_each(?))",
            (kind, json.dumps(list(dict.fromkeys(stages)))),
        )
    return [account_id for (account_id,) in rows]
