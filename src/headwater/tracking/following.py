"""Follows what one stage writes, and tells every tracker each step once.

The files are those the stage keeps anyway (`metrics.jsonl`, rollouts): where its process runs, how
many ranks it has and whether it was resumed does not show. How far each tracker was told is kept
in RUN/trackers/sent, and written before it is told, so that no step comes twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from headwater.config.tracking import Tracker
from headwater.plain_json import parse_json, read_json_file
from headwater.redaction import redact
from headwater.tracking.backends import OpenTracker, TrackedRun, open_tracker
from headwater.tracking.completions import Completion, read_completions
from headwater.tracking.names import NamedRows
from headwater.tracking.stage_files import METRICS_FILE, rollout_files, stage_file

SENT_FOLDER = "sent"


@dataclass(slots=True)
class Sent:
    """How far one tracker was told of one run: its id there, and the last step of each kind."""

    id: str | None = None
    step: int = 0
    completions: int = 0
    summary: dict[str, float] | None = None


@dataclass(slots=True)
class Trackers:
    """The trackers of a run; one that fails is left out from there on, and said so once.

    folder: RUN/trackers, absolute.
    """

    names: tuple[Tracker, ...]
    folder: Path
    say: Callable[[str], None]
    _failed: set[Tracker] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def working(self) -> tuple[Tracker, ...]:
        """Those that did not fail yet."""
        return tuple(name for name in self.names if name not in self._failed)

    def fail(self, name: Tracker, error: BaseException) -> None:
        """Go on without a tracker; says why, once, and how to send what is missing."""
        with self._lock:
            if name in self._failed:
                return
            self._failed.add(name)
        said = " ".join(redact(f"{type(error).__name__}: {error}").split())[:300]
        offline = " (WANDB_MODE=offline keeps it here, for `wandb sync`)" * (name == "wandb")
        self.say(
            f"warning: {name} failed ({said}); expected it to take what the run sends: the run "
            f"goes on without it, and the same command again sends what is missing{offline}"
        )


class TrackedLog:
    """One tracked run in every tracker, opened when there is something to tell.

    key: of the file that keeps how far each was told. All calls come from one thread.
    """

    def __init__(self, trackers: Trackers, run: TrackedRun, key: str) -> None:
        self._trackers, self._run = trackers, run
        self._path = trackers.folder / SENT_FOLDER / f"{key}.json"
        self._open: dict[Tracker, OpenTracker] = {}
        self._sent = {name: Sent() for name in trackers.names}
        if self._path.is_file():
            kept = read_json_file(self._path)
            self._sent |= {name: Sent(**plain) for name, plain in kept.items()}

    def steps(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Tell (step, values) rows, in order; those that a tracker was told are left out."""
        for name in self._trackers.working():
            sent = self._sent[name]
            new = [(step, values) for step, values in rows if step > sent.step]
            if new:
                self._tell(name, partial(self._log, new))

    def _log(
        self, rows: Sequence[tuple[int, Mapping[str, float]]], sent: Sent, tracker: OpenTracker
    ) -> None:
        for step, values in rows:
            with self._marked(sent, step=step, completions=sent.completions):
                tracker.log(values, step)

    def completions(self, rows: Sequence[Completion]) -> None:
        """Tell completions, by step; those of steps that a tracker was told are left out.

        New ones come as one table, at the last step told: trackers only go forward.
        """
        for name in self._trackers.working():
            new = [one for one in rows if one.step > self._sent[name].completions]
            if new:
                self._tell(name, partial(self._table, new))

    def _table(self, rows: Sequence[Completion], sent: Sent, tracker: OpenTracker) -> None:
        last = rows[-1].step
        with self._marked(sent, step=sent.step, completions=last):
            tracker.table("completions", [one.row() for one in rows], max(last, sent.step))

    def summary(self, values: Mapping[str, float]) -> None:
        """Tell values of the run as a whole, unless they are what was told before."""
        for name in self._trackers.working():
            if self._sent[name].summary != values:
                self._tell(name, partial(self._summarise, values))

    def _summarise(self, values: Mapping[str, float], sent: Sent, tracker: OpenTracker) -> None:
        tracker.summarise(values)
        sent.summary = dict(values)
        self._keep()

    def close(self) -> None:
        """Send what is left, and close every tracker."""
        for name, tracker in self._open.items():
            try:
                tracker.finish()
            except Exception as error:  # whatever a tracker's library raises
                self._trackers.fail(name, error)
        self._open.clear()

    def _tell(self, name: Tracker, tell: Callable[[Sent, OpenTracker], None]) -> None:
        if name not in self._trackers.working():
            return
        sent = self._sent[name]
        try:
            if name not in self._open:
                opened = open_tracker(name, self._run, self._trackers.folder, sent.id)
                self._open[name] = opened
                sent.id = opened.id
            tell(sent, self._open[name])
        except Exception as error:  # whatever a tracker's library raises: no run ends of it
            self._trackers.fail(name, error)

    @contextmanager
    def _marked(self, sent: Sent, *, step: int, completions: int) -> Iterator[None]:
        """Keep these marks while something is told, and from there on unless that raises."""
        before = (sent.step, sent.completions)
        sent.step, sent.completions = step, completions
        self._keep()
        try:
            yield
        except BaseException:
            sent.step, sent.completions = before
            self._keep()
            raise

    def _keep(self) -> None:
        """Write how far each tracker was told; whole, since the process may be killed."""
        self._path.parent.mkdir(exist_ok=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps({name: asdict(sent) for name, sent in self._sent.items()}))
        beside.replace(self._path)


class FollowedStage:
    """What one stage has written since it was last looked at.

    every: steps between tables of completions, None for none.
    """

    def __init__(self, run_dir: Path, fingerprint: str, log: TrackedLog, every: int | None) -> None:
        self._run_dir, self._fingerprint = run_dir, fingerprint
        self._log, self._every = log, every
        self._rows = _GrowingRows()
        self._read: tuple[Path, ...] = ()

    def sync(self) -> None:
        """Tell what is new."""
        path = stage_file(self._run_dir, self._fingerprint, METRICS_FILE)
        if path is not None:
            with suppress(FileNotFoundError):  # published in this moment: next time
                self._log.steps(list(self._rows.new(path)))
        if self._every is not None:
            self._completions(self._every)

    def close(self) -> None:
        """Tell what is new for the last time, and close."""
        try:
            self.sync()
        finally:
            self._log.close()

    def _completions(self, every: int) -> None:
        paths = rollout_files(self._run_dir, self._fingerprint)
        if paths == self._read:
            return
        try:
            found = read_completions(paths, lambda step: step % every == 0)
        except (OSError, pa.ArrowException):  # a part that is being written: next time
            return
        self._read = paths
        self._log.completions([one for step in sorted(found) for one in found[step]])


class _GrowingRows:
    """Rows of a metrics.jsonl that grows, and may be cut back or replaced by a longer one."""

    def __init__(self) -> None:
        self._file: tuple[Path, int] | None = None
        self._offset = 0
        self._names = NamedRows()

    def new(self, path: Path) -> Iterator[tuple[int, dict[str, float]]]:
        """(step from 1, values) of whole rows that came since the last look."""
        with path.open("rb") as file:
            found = (path, _inode(path))
            if found != self._file or path.stat().st_size < self._offset:
                self._file, self._offset, self._names = found, 0, NamedRows()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                row = parse_json(line)
                yield self._names.named({key: float(value) for key, value in row.items()})


def _inode(path: Path) -> int:
    return path.stat().st_ino
