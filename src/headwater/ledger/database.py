"""The ledger's tables, and opening the SQLite file that holds them."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from headwater.errors import HeadwaterError, InputError, StageError
from headwater.ledger.spending import INTEGER_COUNTERS, REAL_COUNTERS
from headwater.storage import free_space

BUSY_SECONDS = 60.0
_APPLICATION_ID = 0x48574C47  # "HWLG"
_SCHEMA_VERSION = 1

_COLUMNS = ", ".join(
    [f"{name} INTEGER NOT NULL DEFAULT 0" for name in INTEGER_COUNTERS]
    + [f"{name} REAL NOT NULL DEFAULT 0" for name in REAL_COUNTERS]
)
_SCHEMA = (
    f"""CREATE TABLE accounts (
        id INTEGER PRIMARY KEY, stage TEXT NOT NULL, kind TEXT NOT NULL, {_COLUMNS},
        peak_memory_bytes INTEGER NOT NULL DEFAULT 0, UNIQUE (stage, kind))""",
    f"""CREATE TABLE entries (
        id INTEGER PRIMARY KEY, account INTEGER NOT NULL REFERENCES accounts (id),
        seq INTEGER NOT NULL, state TEXT NOT NULL, {_COLUMNS})""",
    "CREATE UNIQUE INDEX live_entries ON entries (account, seq) WHERE state = 'live'",
    "CREATE INDEX other_entries ON entries (account) WHERE state <> 'live'",
    # first_seq: the live entry that first read the label; NULL once only replayed ones did.
    """CREATE TABLE labels (
        account INTEGER NOT NULL REFERENCES accounts (id), problem TEXT NOT NULL,
        first_seq INTEGER, PRIMARY KEY (account, problem)) WITHOUT ROWID""",
    "CREATE INDEX labels_by_problem ON labels (problem, account) WHERE first_seq IS NOT NULL",
)


def open_database(path: Path) -> sqlite3.Connection:
    """Connect, switch to the write-ahead log, and make the tables in a new file."""
    try:
        db = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        _prepare(db, path)
    except sqlite3.DatabaseError as error:
        raise told(error, path) from error
    return db


def told(error: sqlite3.DatabaseError, path: Path) -> HeadwaterError:
    """What an error of SQLite means: StageError for the disk and for locks, InputError for a
    file that is no ledger or is damaged."""
    if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
        return StageError(
            f"ledger {path}: {error}; it must be writable, on a disk with space left "
            f"({free_space(path)} free) and not held by another process for {BUSY_SECONDS:.0f} s; "
            "free it and run again"
        )
    return InputError(
        f"{path}: {error}; expected a headwater ledger or no file; move {path.name}, "
        f"{path.name}-wal and {path.name}-shm away, or put a copy of them back"
    )


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA trusted_schema = OFF")
    _use_write_ahead_log(db)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN IMMEDIATE")
    try:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and (application, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
            raise InputError(
                f"{path} is not a ledger of version {_SCHEMA_VERSION} (found application "
                f"{application:#x}, version {version}); move it away and run again"
            )
        (programs,) = db.execute(
            "SELECT COUNT(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
        ).fetchone()
        if programs:
            raise InputError(
                f"{path} holds {programs} triggers or views: a ledger has tables alone; move it "
                "away and run again"
            )
        if not tables:
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            for statement in _SCHEMA:
                db.execute(statement)
    except BaseException:
        db.execute("ROLLBACK")
        db.close()
        raise
    db.execute("COMMIT")


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switching a new file over is not covered by SQLite's busy timeout: try again ourselves."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
