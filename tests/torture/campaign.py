"""A campaign: runs hit by faults, again and again, until they finish and are compared."""

from __future__ import annotations

import pickle
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater.api import study as verbs
from headwater.report.outcome import results_of
from headwater.report.results import write_results
from headwater.workflow.progress import ProgressView
from headwater.workflow.run import run_study
from headwater.workflow.study import Study
from processes_seen import all_end, descendants
from torture import comparison, events
from torture.faults import AT_REST, IN_FLIGHT
from torture.processes import Forked, fork, launcher

KILL_RUN, KILL_WORKER = "SIGKILL: the run, at a write", "SIGKILL: a worker, at a write"
FULL_RUN, FULL_WORKER = "disk full: the run", "disk full: a worker"
_EVENTS = (KILL_RUN, KILL_WORKER, FULL_RUN, FULL_WORKER)
FAULTS = (*IN_FLIGHT, *_EVENTS, *AT_REST)
KILLS = frozenset(name for name in FAULTS if name.startswith("SIG"))
_LONGEST_SECONDS = 300.0
#: A run is left alone once it was hit so often.
_MOST_HITS = 12
#: Of the differences of one run.
_MOST_SHOWN = 8


@dataclass
class Tally:
    """What a campaign has done so far; `problems` are runs that did not come out equal."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    differences: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    finished: int = 0

    @property
    def kills(self) -> int:
        """How many faults ended a process or asked it to end."""
        return sum(self.tried[name] for name in KILLS)

    def add(self, other: Tally) -> None:
        """Take in what another lane did."""
        for mine, theirs in (
            (self.tried, other.tried),
            (self.survived, other.survived),
            (self.differences, other.differences),
        ):
            mine.update(theirs)
        self.problems += other.problems
        self.finished += other.finished


@dataclass
class Reference:
    """The undisturbed run: what it left, how long it took, how often each process wrote."""

    findings: dict[str, Any]
    seconds: float
    writes: dict[str, int]


class Attempt:
    """One start of the run's command in a process of its own, with what is to befall it."""

    def __init__(
        self, study: Study, root: Path, watch: dict[str, Callable[[int, str], None]], report: bool
    ) -> None:
        self.log = root / "attempt.log"
        folder = root / "run"

        def prepare(number: int) -> None:
            if number == 0 and "worker" in watch:
                events.watch(folder, watch["worker"])

        def work() -> int:
            if "run" in watch:
                events.watch(folder, watch["run"])
            view = ProgressView(study.graph)
            outcome = run_study(study, folder, view=view, launch=launcher(prepare))
            if report:
                verbs._write_report(outcome)
            else:
                write_results(results_of(outcome), folder)
            return 0

        self.process: Forked = fork(work, self.log)

    def end(self) -> int | None:
        """The exit code; None when it hung and was killed."""
        try:
            code = self.process.wait(_LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            doomed = descendants(self.process.pid)
            self.process.kill()
            all_end(doomed)
            return None
        return code

    @property
    def said(self) -> str:
        """What it printed: an error, if it failed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def reference_run(study: Study, root: Path) -> Reference:
    """Run undisturbed in `root`, and measure."""
    root.mkdir(parents=True)
    counts = {who: root / f"{who}.count" for who in ("run", "worker")}
    watch = {who: events.counted_in(file) for who, file in counts.items()}
    began = time.monotonic()
    attempt = Attempt(study, root, watch, report=False)
    if attempt.end() != 0:
        raise RuntimeError(f"the undisturbed run failed: {attempt.said}")
    seconds = time.monotonic() - began
    found = comparison.findings(root / "run", study.graph)
    writes = {who: int(file.read_text()) for who, file in counts.items()}
    return Reference(found, seconds, writes)


class Lane:
    """Tortures one run after another in `root`, until the time is up or enough is done."""

    def __init__(
        self, study: Study, reference: Reference, root: Path, seed: str, faults: tuple[str, ...]
    ) -> None:
        self._study, self._reference, self._root = study, reference, root
        self._draw = random.Random(seed)
        self._faults = faults
        self.tally = Tally()

    def torture(self, deadline: float, kills: int) -> Tally:
        """Runs until `deadline` (monotonic) or so many kills; a run begun is finished."""
        number = 0
        while time.monotonic() < deadline and self.tally.kills < kills:
            self._one_run(self._root / f"{number:04d}", deadline, kills)
            number += 1
        return self.tally

    def _one_run(self, root: Path, deadline: float, kills: int) -> None:
        root.mkdir(parents=True)
        hits: list[str] = []
        problem = None
        while problem is None:
            enough = time.monotonic() > deadline or self.tally.kills >= kills
            fault = None if enough or len(hits) >= _MOST_HITS else self._choose(root)
            hit, code, said = self._attempt(root, fault)
            if hit and fault:
                hits.append(fault)
                self.tally.tried[fault] += 1
            problem = _unexpected(fault, code, said)
            if code == 0 and fault is None:
                break
            if code == 2 and "ledger" in said and "move" in said:
                for path in (root / "run").glob("ledger.sqlite*"):  # the cure it names
                    path.rename(root / f"{path.name}.{len(hits)}")
        if problem is None:
            found = comparison.findings(root / "run", self._study.graph)
            differing = comparison.differences(self._reference.findings, found)
            problem = "\n".join(differing[:_MOST_SHOWN])
        self.tally.finished += 1
        if problem:
            self.tally.differences.update(set(hits))
            self.tally.problems.append(f"{root}: after {', '.join(hits)}:\n{problem}")
        else:
            self.tally.survived.update(hits)
            shutil.rmtree(root)

    def _choose(self, root: Path) -> str:
        """A fault: kills three times as likely as others, checkpoints while there are some."""
        of_checkpoints = [name for name in self._faults if name.startswith("checkpoint")]
        saved = any((root / "run" / "checkpoints").glob("*/*"))
        if saved and of_checkpoints and self._draw.random() < 0.3:
            return self._draw.choice(of_checkpoints)
        weights = [3 if name in KILLS else 1 for name in self._faults]
        return self._draw.choices(self._faults, weights)[0]

    def _attempt(self, root: Path, fault: str | None) -> tuple[bool, int | None, str]:
        """One start; whether the fault struck, the exit code, and what was said."""
        hit = False
        if fault in AT_REST:
            hit = (root / "run").is_dir() and AT_REST[fault](root / "run", self._draw)
        watch = {}
        if fault in _EVENTS:
            who = "run" if fault in (KILL_RUN, FULL_RUN) else "worker"
            chosen = self._draw.randint(1, max(1, round(self._left(root, who) * 1.1)))
            kind = events.killed_at if fault in (KILL_RUN, KILL_WORKER) else events.disk_full_from
            watch[who] = kind(chosen)
        report = self._draw.random() < 0.1  # drawing figures takes as long as training
        attempt = Attempt(self._study, root, watch, report)
        if fault in IN_FLIGHT:
            left = self._reference.seconds * self._unfinished(root) + 0.5
            time.sleep(self._draw.random() * left)
            while attempt.process.poll() is None and not hit:  # what is to be hit may yet start
                hit = IN_FLIGHT[fault](attempt.process.pid, self._draw)
                time.sleep(0.0 if hit else 0.01)
        code = attempt.end()
        if fault in _EVENTS:
            hit = code != 0
        return hit, code, attempt.said

    def _left(self, root: Path, who: str) -> float:
        writes = self._reference.writes[who]
        return writes if who == "run" else writes * self._unfinished(root)

    def _unfinished(self, root: Path) -> float:
        """Share of the stages that are still to do."""
        done = sum(
            (root / "run" / "artifacts" / fingerprint).is_dir()
            for fingerprint in self._study.graph.nodes
        )
        return 1.0 - done / len(self._study.graph.nodes)


def _unexpected(fault: str | None, code: int | None, said: str) -> str | None:
    """What is wrong with how an attempt ended; None for how this fault may end it."""
    allowed = {0}
    if fault in (KILL_RUN, "SIGKILL: the run", "SIGKILL: all at once"):
        allowed |= {-9, 1} if fault == KILL_RUN else {-9}
    elif fault in (KILL_WORKER, "SIGKILL: a worker"):
        allowed |= {1}
    elif fault in ("SIGINT", "SIGINT, twice"):
        allowed |= {130}
    elif fault in (FULL_RUN, FULL_WORKER):
        allowed |= {1}
    elif fault in ("ledger: bit flipped",):
        allowed |= {2}
    if code is None:
        return f"{fault}: the run hung"
    if code not in allowed or "Traceback" in said:
        return f"{fault}: exit code {code}, expected one of {sorted(allowed)}; it said: {said}"
    if code == 1 and fault in (FULL_RUN, FULL_WORKER) and "space" not in said:
        return f"{fault}: the error does not speak of space: {said}"
    if code == 1 and fault == "SIGKILL: a worker" and "killed by SIGKILL" not in said:
        return f"{fault}: the error does not speak of the kill: {said}"
    return None


def run_lanes(
    study: Study,
    reference: Reference,
    root: Path,
    *,
    seed: str,
    seconds: float,
    kills: int,
    lanes: int,
    faults: tuple[str, ...] = FAULTS,
) -> Tally:
    """Torture in `lanes` processes at once; everything they found, together."""
    deadline = time.monotonic() + seconds
    forked = []
    for number in range(lanes):
        folder = root / f"lane-{number}"
        folder.mkdir(parents=True)

        def work(number: int = number, folder: Path = folder) -> int:
            lane = Lane(study, reference, folder, f"{seed}/{number}", faults)
            tally = lane.torture(deadline, -(-kills // lanes))
            (folder / "tally").write_bytes(pickle.dumps(tally))
            return 0

        forked.append((fork(work, folder / "lane.log"), folder))
    total = Tally()
    for process, folder in forked:
        if process.wait() == 0:
            total.add(pickle.loads((folder / "tally").read_bytes()))
        else:
            total.problems.append((folder / "lane.log").read_text())
    return total
