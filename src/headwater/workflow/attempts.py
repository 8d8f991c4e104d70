"""Attempts at stages, as the run counts them: one at a time has the stage's folders and account.

On a cluster a process may be given up for lost and yet go on, on a node that was cut off. So each
attempt has a number, everything that it asks for is asked with it, and only the latest attempt's
is done. This is the side that has the ledger and the labels; it runs on the machine of the run, in
one thread, so that a question is answered before the next one is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from headwater.errors import Interrupted, StageError
from headwater.ledger import Ledger
from headwater.ledger.ledger import Account
from headwater.ledger.statement import closing_statement
from headwater.types import Label
from headwater.workflow.messages import Done, Failed, Progress, Warned, WorkerSetup
from headwater.workflow.record import LEDGER_FILE
from headwater.workflow.stage_run import account_kind, reply_of
from headwater.workflow.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Offer:
    """A stage that may be attempted; `labels` is None for kinds that may not see any."""

    stage: str
    kind: str
    description: str
    labels: tuple[Label, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Claim:
    """A stage in the hands of one attempt: its number from 1, and its folders."""

    attempt: int
    output_dir: Path
    checkpoint_dir: Path
    labels: tuple[Label, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt has the stage in hand."""

    attempt: int


News = tuple[str, Started | Progress | Warned]


@dataclass(slots=True)
class _Stage:
    offer: Offer
    account: Account | None = None
    attempt: int = 0
    stopped: bool = False
    ended: Done | Failed | None = None  # published, or not to be tried again


class Attempts:
    """The stages of a run that were offered, and what their attempts ask for.

    retries: how many attempts of a stage may be lost before the stage is.
    """

    def __init__(self, setup: WorkerSetup, retries: int) -> None:
        self._run_dir = setup.run_dir
        self._retries = retries
        self._store = ArtifactStore(setup.run_dir)
        self._ledger = Ledger(setup.run_dir / LEDGER_FILE, setup.limits, setup.stages)
        self._stages: dict[str, _Stage] = {}
        self._news: list[News] = []

    # --- for the run ----------------------------------------------------------------------------

    def offer(self, offered: Offer) -> None:
        """From here on the stage may be claimed."""
        self._stages[offered.stage] = _Stage(offered)

    def stop(self, stages: Iterable[str]) -> list[str]:
        """Attempts at these stages are to save and stop; returns those that nobody claimed yet."""
        found = [self._stages[stage] for stage in stages]
        for stage in found:
            stage.stopped = True
        return [stage.offer.stage for stage in found if stage.attempt == 0]

    def news(self) -> list[News]:
        """What attempts told since this was last asked, in order."""
        told, self._news = self._news, []
        return told

    def close(self) -> None:
        """Take back the folders of all attempts; what they ask for from here on is refused."""
        for name, stage in self._stages.items():
            if stage.ended is None:
                stage.ended = Failed.of(Interrupted("the run has ended"), stage.offer.description)
                self._store.take_back(name)
        self._ledger.close()

    # --- for attempts ---------------------------------------------------------------------------

    def ask(self, question: str, *arguments: Any) -> Done | Failed:
        """The answer to one of the questions below, or its error as a message."""
        work = partial(_QUESTIONS[question], self, *arguments)
        return reply_of(lambda: Done(value=work()), question, self._run_dir)

    def _claim(self, stage: str) -> Claim | Done:
        """Take a stage in hand; Done where an attempt published it that never came to say so.

        Raises the error that ended the stage for good, Interrupted where it is to stop, and
        StageError where it was lost too often.
        """
        found = self._stages[stage]
        if isinstance(found.ended, Failed):
            raise found.ended.error()
        if found.ended is not None:
            return found.ended
        if found.stopped:
            raise Interrupted("stopped by the user; run the same command again to continue")
        if found.attempt > self._retries:
            raise StageError(
                f"{found.offer.description}: its process was lost {found.attempt} times; expected "
                f"at most {self._retries}: look for too little memory or a failing node, set "
                "compute.retries higher, and run again to continue"
            )
        found.attempt += 1
        found.account = self._ledger.account(stage, account_kind(found.offer.kind))
        self._store.take_back(stage)
        if not self._store.begin(stage):
            found.account.rewind(0)
        folders = self._store.lend(stage, found.attempt)
        self._news.append((stage, Started(found.attempt)))
        return Claim(found.attempt, *folders, labels=found.offer.labels)

    def _spend(
        self,
        stage: str,
        attempt: int,
        method: str,
        arguments: Sequence[Any],
        amounts: Mapping[str, float],
    ) -> Any:
        """What a method of the stage's account returns. Raises what it does."""
        account = self._current(stage, attempt).account
        assert account is not None
        return _ACCOUNT[method](account, *arguments, **amounts)

    def _statement(self, stage: str, attempt: int) -> dict[str, Any]:
        """The closing statement of the stage's account, as plain values."""
        kind = account_kind(self._current(stage, attempt).offer.kind)
        statement = closing_statement(self._ledger, stage, kind)
        assert statement is not None, "a claim opens the account"
        return statement.as_dict()

    def _publish(self, stage: str, attempt: int, staged: Path, seconds: float) -> None:
        """Make a sealed folder the stage's artifact."""
        found = self._current(stage, attempt)
        self._store.adopt(stage, staged)
        found.ended = Done(seconds)

    def _ending(self, stage: str) -> Done | Failed | None:
        """How the stage ended; None while it may be tried again."""
        return self._stages[stage].ended

    def _fail(self, stage: str, attempt: int, failed: Failed) -> None:
        """The stage ended with this error and is not to be tried again in this run."""
        found = self._current(stage, attempt)
        found.ended = failed
        self._store.take_back(stage)

    def _tell(self, stage: str, attempt: int, message: Progress | Warned) -> None:
        """Numbers or an alert of an attempt."""
        self._current(stage, attempt)
        self._news.append((stage, message))

    def _must_stop(self, stage: str, attempt: int) -> bool:
        """Whether the attempt is to save itself and stop."""
        return self._current(stage, attempt).stopped

    def _current(self, stage: str, attempt: int) -> _Stage:
        """The stage, for its latest attempt while it runs. Raises StageError for any other."""
        found = self._stages[stage]
        if attempt != found.attempt or found.ended is not None:
            latest = "has ended" if found.ended is not None else f"is in attempt {found.attempt}"
            raise StageError(
                f"{found.offer.description}: attempt {attempt} asks to charge or publish, but the "
                f"stage {latest}; expected the latest attempt alone: this one was taken for lost, "
                "and whatever it does is dropped"
            )
        return found


_QUESTIONS: dict[str, Callable[..., Any]] = {
    "claim": Attempts._claim,
    "spend": Attempts._spend,
    "statement": Attempts._statement,
    "publish": Attempts._publish,
    "ending": Attempts._ending,
    "fail": Attempts._fail,
    "tell": Attempts._tell,
    "must_stop": Attempts._must_stop,
}
_ACCOUNT: dict[str, Callable[..., Any]] = {
    "read_labels": Account.read_labels,
    "charge": Account.charge,
    "remaining": Account.remaining,
    "observe_peak_memory": Account.observe_peak_memory,
    "position": Account.position,
    "rewind": Account.rewind,
}
