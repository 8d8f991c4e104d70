"""Artifacts on disk: published whole or not at all, and checked before they are used.

A run folder holds `artifacts/<fingerprint>/` (finished), `staging/<fingerprint>/` (being
written) and `checkpoints/<fingerprint>/` (how an interrupted stage continues). A stage that runs
on a cluster has the latter two lent to its attempt, as `<fingerprint>.<attempt>`: an attempt that
was given up, but still writes somewhere, finds nothing of the next one's under its own name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headwater.errors import InputError, StageError
from headwater.plain_json import read_json_file
from headwater.storage import (
    UNFINISHED,
    disk_errors,
    flush,
    flush_tree,
    sealed,
    sha256_of,
    unsealed,
    write_whole,
)
from headwater.types import Artifact
from headwater.workflow.confinement import is_folder_name, is_inside

MANIFEST = "manifest.json"
_REMOVED = ".removed"


@dataclass(frozen=True, slots=True)
class Damage:
    """An artifact that does not match its manifest, and in what."""

    fingerprint: str
    reason: str


class ArtifactStore:
    """The artifacts of one run folder. Hashes are checked once per store, sizes always."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._artifacts = run_dir / "artifacts"
        self._staging = run_dir / "staging"
        self._checkpoints = run_dir / "checkpoints"
        for folder in (self._artifacts, self._staging, self._checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        self._hashed: set[str] = set()

    def path(self, fingerprint: str) -> Path:
        """Where the artifact lies once it is published."""
        return self._artifacts / _own_name(fingerprint)

    def staging_dir(self, fingerprint: str) -> Path:
        """Where a stage writes its result."""
        return self._staging / _own_name(fingerprint)

    def checkpoint_dir(self, fingerprint: str) -> Path:
        """Where a stage keeps what it needs to continue."""
        return self._checkpoints / _own_name(fingerprint)

    def get(self, fingerprint: str) -> Artifact | None:
        """The published artifact, or None. Raises StageError naming what is damaged in it."""
        if not self.path(fingerprint).is_dir():
            return None
        damage = self.find_damage(fingerprint)
        if damage is not None:
            raise StageError(
                f"{self.path(fingerprint)}: {damage.reason}; run the recipe again to rebuild it"
            )
        manifest = self.manifest(fingerprint)
        return Artifact(
            manifest["kind"], fingerprint, self.path(fingerprint), tuple(manifest["parents"])
        )

    def manifest(self, fingerprint: str) -> dict[str, Any]:
        """What was written beside a published artifact: kind, parents, settings, files."""
        found = unsealed(read_json_file(self.path(fingerprint) / MANIFEST))
        if not {"kind", "parents", "files"} <= found.keys():
            raise ValueError("manifest lacks kind, parents or files")
        files = found["files"]
        if not isinstance(files, dict) or not all(map(_is_file_entry, files.items())):
            raise ValueError("manifest names a file outside its artifact, or without size and hash")
        return found

    def find_damage(self, fingerprint: str) -> Damage | None:
        """What is wrong with a published artifact; None when it is sound.

        Raises StageError for one that may not be read, which is no damage.
        """
        with disk_errors(self.path(fingerprint)):
            return self._find_damage(fingerprint)

    def _find_damage(self, fingerprint: str) -> Damage | None:
        folder = self.path(fingerprint)
        try:
            files = self.manifest(fingerprint)["files"]
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            return Damage(fingerprint, f"{MANIFEST} cannot be read ({error})")
        linked = next((path for path in folder.rglob("*") if path.is_symlink()), None)
        if linked is not None:
            return Damage(fingerprint, f"{linked.name} is a link and no file of its own")
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return Damage(fingerprint, f"{name} is missing")
            size = file.stat().st_size
            if size != expected["bytes"]:
                return Damage(fingerprint, f"{name} has {size} bytes, not {expected['bytes']}")
            if fingerprint not in self._hashed and sha256_of(file) != expected["sha256"]:
                return Damage(fingerprint, f"{name} differs from its recorded hash")
        self._hashed.add(fingerprint)
        return None

    def discard(self, fingerprint: str) -> None:
        """Remove an artifact together with any state its stage left, so that it is rebuilt."""
        for folder in (
            self.path(fingerprint),
            self.staging_dir(fingerprint),
            self.checkpoint_dir(fingerprint),
        ):
            _remove(folder)

    def tidy(self) -> None:
        """Remove what a killed run left behind and nobody will ask for again.

        That is half-removed folders, and staging and checkpoints of published stages; what was
        lent to attempts is taken back. Only for the owner of the run folder.
        """
        for folder in (self._artifacts, self._staging, self._checkpoints):
            for path in folder.glob(f"*{_REMOVED}"):
                shutil.rmtree(path)
        for folder in (self._staging, self._checkpoints):
            for fingerprint in {_lent(path)[0] for path in folder.iterdir()}:
                self.take_back(fingerprint)
            for path in folder.iterdir():
                if self.path(path.name).is_dir():
                    _remove(path)

    def begin(self, fingerprint: str) -> bool:
        """Prepare the folders of a stage; returns whether it continues from a checkpoint.

        Without a checkpoint, whatever a former attempt left in staging is removed; with one, what
        it was writing when it ended.
        """
        checkpoint = self.checkpoint_dir(fingerprint)
        continues = checkpoint.is_dir() and any(checkpoint.iterdir())
        if not continues:
            _remove(self.staging_dir(fingerprint))
        for unfinished in self.staging_dir(fingerprint).rglob(f"*{UNFINISHED}"):
            unfinished.unlink()
        self.staging_dir(fingerprint).mkdir(parents=True, exist_ok=True)
        checkpoint.mkdir(parents=True, exist_ok=True)
        return continues

    def lend(self, fingerprint: str, attempt: int) -> tuple[Path, Path]:
        """Give the folders of a stage that has begun to one attempt: (staging, checkpoint)."""
        lent = [
            folder.rename(folder.with_name(f"{folder.name}.{attempt}"))
            for folder in (self.staging_dir(fingerprint), self.checkpoint_dir(fingerprint))
        ]
        return lent[0], lent[1]

    def take_back(self, fingerprint: str) -> None:
        """Put what the latest attempt has where `begin` looks; of earlier ones nothing is kept."""
        for folder in (self._staging, self._checkpoints):
            own = folder / _own_name(fingerprint)
            lent = [path for path in folder.glob(f"{fingerprint}.*") if _lent(path)[1]]
            for path in sorted(lent, key=lambda path: _lent(path)[1]):
                _remove(own)
                path.rename(own)

    def publish(self, fingerprint: str, facts: Mapping[str, Any]) -> Path:
        """Make the staged result an artifact in one step; returns its folder.

        facts: what the manifest says beside the files (kind, parents, config, seed, seconds).
        """
        seal_artifact(self.staging_dir(fingerprint), fingerprint, facts)
        return self.adopt(fingerprint, self.staging_dir(fingerprint))

    def adopt(self, fingerprint: str, staged: Path) -> Path:
        """Make a sealed folder the artifact, by one rename; returns where it then lies."""
        _remove(self.path(fingerprint))
        staged.rename(self.path(fingerprint))
        flush(self._artifacts)
        self.take_back(fingerprint)
        _remove(self.checkpoint_dir(fingerprint))
        self._hashed.add(fingerprint)
        return self.path(fingerprint)


def seal_artifact(staged: Path, fingerprint: str, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a staged result, with the hashes of its files, and flush it all."""
    files = {}
    for file in sorted(p for p in staged.rglob("*") if p.is_file() and p != staged / MANIFEST):
        files[file.relative_to(staged).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
    manifest = sealed({"fingerprint": fingerprint, **facts, "files": files})
    write_whole(staged / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    flush_tree(staged)


@contextmanager
def run_lock(run_dir: Path, wait_seconds: float = 10.0) -> Iterator[None]:
    """Hold a run folder for one run; the system releases it when the process ends, however.

    Waits up to `wait_seconds` for the workers of a run that was killed. Raises InputError with
    the owner's process id when another run holds the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with _open_lock(run_dir / "run.lock") as owner, _open_lock(worker_lock(run_dir)) as workers:
        if not _try_lock(owner):
            owner.seek(0)
            pid = owner.read().strip() or "unknown"
            raise InputError(
                f"{run_dir}: in use by process {pid}; wait for that run to end, or give --out "
                "another folder"
            )
        owner.truncate(0)
        owner.write(str(os.getpid()))
        owner.flush()
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(workers):
            if time.monotonic() > deadline:
                raise InputError(
                    f"{run_dir}: workers of an earlier run did not end within "
                    f"{wait_seconds:g} s; try again in a moment, or give --out another folder"
                )
            time.sleep(0.05)
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def worker_lock(run_dir: Path) -> Path:
    """The file every worker holds a shared lock on while it lives."""
    return run_dir / "workers.lock"


def _open_lock(path: Path) -> IO[str]:
    return path.open("a+", encoding="utf-8")


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _own_name(fingerprint: str) -> str:
    if not is_folder_name(fingerprint):
        raise InputError(
            f"{fingerprint!r} is no fingerprint: expected letters and digits, as in artifacts/; "
            "this run's record was changed: run the recipe again"
        )
    return fingerprint


def _lent(path: Path) -> tuple[str, int]:
    """(fingerprint, attempt) of a folder of staging or checkpoints; 0 where it is not lent."""
    fingerprint, _, attempt = path.name.rpartition(".")
    lent = bool(fingerprint) and attempt.isascii() and attempt.isdigit()
    return (fingerprint, int(attempt)) if lent else (path.name, 0)


def _is_file_entry(entry: tuple[object, object]) -> bool:
    name, facts = entry
    known = isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
    return known and is_inside(name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Renamed first, so that a half-removed folder is never taken for a whole one.
        doomed = path.with_name(f"{path.name}{_REMOVED}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
