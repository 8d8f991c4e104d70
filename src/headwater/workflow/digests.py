"""Hashes of plain values, which name stages and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON, in hexadecimal."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """`digest` of a list of these rows, which is never held as a whole."""
    digest = hashlib.sha256(b"[")
    before = ""
    for row in rows:
        digest.update(f"{before}{_CANONICAL.encode(row)}".encode())
        before = ","
    digest.update(b"]")
    return digest.hexdigest()
