"""Where a stage's files are while it runs, and once it is published."""

from __future__ import annotations

from pathlib import Path

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.parquet"


def stage_file(run_dir: Path, fingerprint: str, name: str) -> Path | None:
    """A stage's file of this name: the published one, else the newest that an attempt writes."""
    published = run_dir / "artifacts" / fingerprint / name
    if published.is_file():
        return published
    found = [
        path
        for place in ("checkpoints", "staging")
        for folder in (fingerprint, f"{fingerprint}.*")  # attempts on a cluster are numbered
        for path in (run_dir / place).glob(f"{folder}/{name}")
    ]
    return max(found, key=_modified, default=None)


def rollout_files(run_dir: Path, fingerprint: str) -> tuple[Path, ...]:
    """The rollouts a stage has kept so far, in the order of steps: one file, or its parts."""
    published = run_dir / "artifacts" / fingerprint / ROLLOUTS_FILE
    if published.is_file():
        return (published,)
    metrics = stage_file(run_dir, fingerprint, METRICS_FILE)
    if metrics is None:
        return ()
    return tuple(sorted((metrics.parent / "rollouts").glob("part-*.parquet")))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # published in this moment
        return 0.0
