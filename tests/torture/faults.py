"""The faults: what may befall a run while it goes, and what may befall its folder at rest."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from processes_seen import children, descendants

# --- while it runs -------------------------------------------------------------------------------


def kill_run(pid: int, draw: random.Random) -> bool:
    """SIGKILL to the run's own process."""
    return _kill([pid])


def kill_worker(pid: int, draw: random.Random) -> bool:
    """SIGKILL to one of its workers."""
    workers = children(pid)
    return bool(workers) and _kill([draw.choice(workers)])


def kill_verifier(pid: int, draw: random.Random) -> bool:
    """SIGKILL to a process that some worker's verifier started."""
    found = [one for worker in children(pid) for one in descendants(worker)]
    return bool(found) and _kill([draw.choice(found)])


def kill_everything(pid: int, draw: random.Random) -> bool:
    """SIGKILL to the run and all that it started, at once."""
    return _kill([pid, *descendants(pid)])


def interrupt(pid: int, draw: random.Random) -> bool:
    """Ctrl-C."""
    return _kill([pid], signal.SIGINT)


def interrupt_twice(pid: int, draw: random.Random) -> bool:
    """Ctrl-C, and again after a moment."""
    if not _kill([pid], signal.SIGINT):
        return False
    time.sleep(draw.random() * 0.3)
    _kill([pid], signal.SIGINT)
    return True


def _kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> bool:
    hit = False
    for pid in pids:
        try:
            os.kill(pid, number)
            hit = True
        except ProcessLookupError:
            continue
    return hit


# --- at rest -------------------------------------------------------------------------------------


def flip_artifact(run: Path, draw: random.Random) -> bool:
    """One bit of a published file."""
    return _damage(run / "artifacts", draw, flip)


def truncate_artifact(run: Path, draw: random.Random) -> bool:
    """A published file loses its end."""
    return _damage(run / "artifacts", draw, truncate)


def delete_artifact_file(run: Path, draw: random.Random) -> bool:
    """A published file is gone."""
    return _damage(run / "artifacts", draw, lambda path, _: path.unlink())


def remove_artifact(run: Path, draw: random.Random) -> bool:
    """A whole published folder is gone."""
    found = _folders(run / "artifacts")
    if found:
        shutil.rmtree(draw.choice(found))
    return bool(found)


def flip_checkpoint(run: Path, draw: random.Random) -> bool:
    """One bit of a file that an interrupted stage continues from."""
    return _damage(run / "checkpoints", draw, flip)


def truncate_checkpoint(run: Path, draw: random.Random) -> bool:
    """A file that an interrupted stage continues from loses its end."""
    return _damage(run / "checkpoints", draw, truncate)


def leave_staging(run: Path, draw: random.Random) -> bool:
    """A folder is half written: what a published artifact would be made from, gone wrong."""
    found = _folders(run / "artifacts")
    if not found:
        return False
    chosen = draw.choice(found)
    staged = run / "staging" / chosen.name
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(chosen, staged)
    shutil.rmtree(chosen)
    for path in [p for p in staged.rglob("*") if p.is_file()]:
        draw.choice((flip, truncate, lambda path, _: path.unlink()))(path, draw)
    return True


def flip_ledger(run: Path, draw: random.Random) -> bool:
    """One bit of the ledger's file or of its log."""
    files = [p for p in run.glob("ledger.sqlite*") if p.suffix != ".sqlite-shm"]
    files = [p for p in files if p.stat().st_size]
    if files:
        flip(draw.choice(files), draw)
    return bool(files)


def lose_ledger(run: Path, draw: random.Random) -> bool:
    """The ledger is gone."""
    files = list(run.glob("ledger.sqlite*"))
    for path in files:
        path.unlink()
    return bool(files)


def flip(path: Path, draw: random.Random) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    if content:
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    """Cut a file off somewhere before its end."""
    size = path.stat().st_size
    if size:
        os.truncate(path, draw.randrange(size))


def _damage(folder: Path, draw: random.Random, how: Callable[[Path, random.Random], None]) -> bool:
    """Damage a file of a random stage's folder: small files are as likely as large ones."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    if found:
        how(draw.choice(found), draw)
    return bool(found)


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.is_dir()]


#: Befalls a running process; returns whether there was something to hit.
IN_FLIGHT: dict[str, Callable[[int, random.Random], bool]] = {
    "SIGKILL: the run": kill_run,
    "SIGKILL: a worker": kill_worker,
    "SIGKILL: of the verifier": kill_verifier,
    "SIGKILL: all at once": kill_everything,
    "SIGINT": interrupt,
    "SIGINT, twice": interrupt_twice,
}
#: Befalls a run folder at rest; returns whether there was something to damage.
AT_REST: dict[str, Callable[[Path, random.Random], bool]] = {
    "published file: bit flipped": flip_artifact,
    "published file: truncated": truncate_artifact,
    "published file: deleted": delete_artifact_file,
    "published folder: removed": remove_artifact,
    "checkpoint file: bit flipped": flip_checkpoint,
    "checkpoint file: truncated": truncate_checkpoint,
    "staging folder: half written": leave_staging,
    "ledger: bit flipped": flip_ledger,
    "ledger: lost": lose_ledger,
}
