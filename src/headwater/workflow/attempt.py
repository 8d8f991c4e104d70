"""One attempt at a stage, as the process that makes it has it: everything is asked of the run.

What asking takes (a call to another machine) is the caller's; see `attempts` for the other side.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headwater.ledger.spending import SpendingAccount
from headwater.stages.alerts import Alert
from headwater.storage import write_whole
from headwater.workflow.accounts import ACCOUNT_FILE
from headwater.workflow.attempts import Claim
from headwater.workflow.messages import Failed, Progress, StageTask, Warned
from headwater.workflow.stage_run import Begun, closing_facts, require_parents
from headwater.workflow.store import ArtifactStore, seal_artifact

_MOMENT_SECONDS = 0.2


class Ask(Protocol):
    """Asks `attempts.Attempts` a question and returns the answer's value, or raises its error."""

    def __call__(self, question: str, *arguments: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class RemoteAccount:
    """The account of a stage, kept where the run is; says and raises what `ledger.Account` does."""

    ask: Ask
    stage: str
    attempt: int

    def read_labels(self, problem_ids: Sequence[str], verifier_calls_each: int = 1) -> int:
        """Charge the reading of gold answers; returns how many ids were paid for."""
        return int(self._spend("read_labels", list(problem_ids), verifier_calls_each))

    def charge(self, **amounts: float) -> None:
        """Charge work that was done. Raises BudgetExhausted."""
        self._spend("charge", **amounts)

    def remaining(self, counter: str) -> float:
        """What the budget still allows of a counter."""
        return float(self._spend("remaining", counter))

    def observe_peak_memory(self, bytes_: int) -> None:
        """Keep the largest memory use seen, in bytes."""
        self._spend("observe_peak_memory", bytes_)

    def position(self) -> int:
        """Number of live entries."""
        return int(self._spend("position"))

    def rewind(self, position: int) -> None:
        """Entries after `position` count no longer."""
        self._spend("rewind", position)

    def _spend(self, method: str, *arguments: Any, **amounts: float) -> Any:
        return self.ask("spend", self.stage, self.attempt, method, arguments, amounts)


class Attempt:
    """One attempt: keeps the stage for `stage_run`, and tells the run how it goes.

    Progress is told, and whether to stop is asked, at most every fifth of a second.
    """

    def __init__(self, ask: Ask, stage: str, claim: Claim, store: ArtifactStore) -> None:
        self._ask = ask
        self._stage = stage
        self._claim = claim
        self._store = store
        self._told_at = self._asked_at = -_MOMENT_SECONDS
        self._stop = False

    @property
    def account(self) -> SpendingAccount:
        """The stage's account."""
        return RemoteAccount(self._ask, self._stage, self._claim.attempt)

    def begin(self, task: StageTask) -> Begun:
        """The job with this attempt's folders. Raises StageError where a parent is gone."""
        require_parents(task, self._store)
        claim = self._claim
        job = replace(task.job, output_dir=claim.output_dir, checkpoint_dir=claim.checkpoint_dir)
        return Begun(job, self.account, claim.labels)

    def publish(self, task: StageTask, seconds: float) -> None:
        """Make what it wrote an artifact, with the closing statement of its account."""
        number, staged = self._claim.attempt, self._claim.output_dir
        statement = self._ask("statement", self._stage, number)
        write_whole(staged / ACCOUNT_FILE, json.dumps(statement, indent=1) + "\n")
        seal_artifact(staged, self._stage, closing_facts(task, seconds))
        self._ask("publish", self._stage, number, staged, seconds)

    def fail(self, failed: Failed) -> None:
        """The stage ended with this error: it is not to be tried again in this run."""
        self._ask("fail", self._stage, self._claim.attempt, failed)

    def report_progress(self, values: Mapping[str, Any]) -> None:
        """Tell the stage's numbers, unless some were told a moment ago."""
        now = time.monotonic()
        if now - self._told_at >= _MOMENT_SECONDS:
            self._told_at = now
            self._ask("tell", self._stage, self._claim.attempt, Progress(dict(values)))

    def report_alert(self, alert: Alert) -> None:
        """Tell an alert."""
        self._ask("tell", self._stage, self._claim.attempt, Warned(alert.words))

    def stop_requested(self) -> bool:
        """Whether to save and stop, as it was a moment ago at the latest."""
        now = time.monotonic()
        if not self._stop and now - self._asked_at >= _MOMENT_SECONDS:
            self._asked_at = now
            self._stop = bool(self._ask("must_stop", self._stage, self._claim.attempt))
        return self._stop
