"""The ledger against a plain Python model, under several writers, and under kills."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headwater.errors import BudgetExhausted
from headwater.ledger import Ledger, Spending

STAGES = ("teacher", "student", "cold")
KINDS = ("train", "eval")
LIMITS = {"labels": 6, "verifier_calls": 40, "generated_tokens": 500, "updates": 9}
IDS = st.lists(st.sampled_from([f"p{i}" for i in range(10)]), max_size=12)


@dataclass
class Entry:
    amounts: dict[str, float]
    read: tuple[str, ...] = ()
    live: bool = True


@dataclass
class ModelAccount:
    entries: list[Entry] = field(default_factory=list)

    def live(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.live]


def total(entries: list[Entry], name: str) -> float:
    return sum(entry.amounts.get(name, 0) for entry in entries)


def distinct(entries: list[Entry]) -> int:
    return len({problem for entry in entries for problem in entry.read})


class LedgerMachine(RuleBasedStateMachine):
    """Charges, readings, rewinds and reopenings in any order, on six accounts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.ledger = Ledger(self.path, LIMITS)
        self.model = {(stage, kind): ModelAccount() for stage in STAGES for kind in KINDS}

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()

    def run_entries(self, kind: str) -> list[Entry]:
        return [e for (_, k), account in self.model.items() if k == kind for e in account.live()]

    def grantable(self, ids: list[str], price: int) -> int:
        entries = self.run_entries("train")
        calls = total(entries, "verifier_calls")
        known = {problem for entry in entries for problem in entry.read}
        for index, problem in enumerate(ids):
            calls += price
            known.add(problem)
            if len(known) > LIMITS["labels"] or calls > LIMITS["verifier_calls"]:
                return index
        return len(ids)

    @rule(
        stage=st.sampled_from(STAGES), kind=st.sampled_from(KINDS), ids=IDS, price=st.integers(0, 2)
    )
    def read(self, stage: str, kind: str, ids: list[str], price: int) -> None:
        granted = self.ledger.account(stage, kind).read_labels(ids, verifier_calls_each=price)
        expected = self.grantable(ids, price) if kind == "train" else len(ids)
        assert granted == expected
        if granted:
            amounts = {"verifier_calls": granted * price}
            self.model[stage, kind].entries.append(Entry(amounts, tuple(ids[:granted])))

    @rule(
        stage=st.sampled_from(STAGES),
        kind=st.sampled_from(KINDS),
        tokens=st.integers(0, 200),
        updates=st.integers(0, 2),
        seconds=st.floats(0, 10),
    )
    def charge(self, stage: str, kind: str, tokens: int, updates: int, seconds: float) -> None:
        amounts = {"generated_tokens": tokens, "updates": updates, "seconds": seconds}
        run = self.run_entries("train")
        fits = kind == "eval" or all(
            not amounts[name] or total(run, name) + amounts[name] <= LIMITS[name]
            for name in ("generated_tokens", "updates")
        )
        account = self.ledger.account(stage, kind)
        if fits:
            account.charge(**amounts)
        else:
            with pytest.raises(BudgetExhausted):
                account.charge(**amounts)
        self.model[stage, kind].entries.append(Entry(amounts, live=fits))

    @rule(stage=st.sampled_from(STAGES), kind=st.sampled_from(KINDS), share=st.floats(0, 1))
    def rewind(self, stage: str, kind: str, share: float) -> None:
        live = self.model[stage, kind].live()
        position = int(share * len(live))
        self.ledger.account(stage, kind).rewind(position)
        for entry in live[position:]:
            entry.live = False

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path, LIMITS)

    @invariant()
    def equals_the_model(self) -> None:
        for kind in KINDS:
            accounts = {s: self.model[s, kind] for s in STAGES}
            assert self.ledger.spending(kind=kind) == self.expected(accounts.values(), True)
            assert self.ledger.spending(STAGES[:2], kind) == self.expected(
                [accounts[s] for s in STAGES[:2]], True
            )
            physical = self.ledger.physical(kind)
            expected = self.expected(accounts.values(), False)
            assert physical.seconds == pytest.approx(expected.seconds, rel=1e-12)
            for name in ("labels", "verifier_calls", "generated_tokens", "updates"):
                assert getattr(physical, name) == getattr(expected, name)
        for (stage, kind), account in self.model.items():
            assert self.ledger.account(stage, kind).position() == len(account.live())

    @staticmethod
    def expected(accounts: object, logical: bool) -> Spending:
        chosen = [a.live() if logical else a.entries for a in accounts]  # type: ignore[attr-defined]
        merged = [entry for entries in chosen for entry in entries]
        return Spending(
            labels=distinct(merged),
            verifier_calls=int(total(merged, "verifier_calls")),
            generated_tokens=int(total(merged, "generated_tokens")),
            updates=int(total(merged, "updates")),
            # Each account adds in its own order, accounts are added with exact rounding.
            seconds=math.fsum(total(entries, "seconds") for entries in chosen),
        )


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


def spend(path: Path, limits: dict[str, float], stage: str, first_id: int, queue: object) -> None:
    """A writer process: 60 readings of 8 ids and 60 charges; reports what it was granted."""
    account = Ledger(path, limits).account(stage)
    granted = 0
    for step in range(60):
        granted += account.read_labels([f"p{first_id + step}"] * 8)
        account.charge(updates=1, generated_tokens=7, seconds=0.25)
    queue.put(granted)  # type: ignore[attr-defined]


def run_writers(path: Path, limits: dict[str, float], stages: list[str], method: str) -> int:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    writers = [
        context.Process(target=spend, args=(path, limits, stage, 30 * index, queue))
        for index, stage in enumerate(stages)
    ]
    for writer in writers:
        writer.start()
    granted = sum(queue.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    return granted


@pytest.mark.parametrize("stages", [["a", "b"], ["a", "a"]], ids=["two stages", "one stage"])
def test_two_processes_writing_at_once_lose_nothing(tmp_path: Path, stages: list[str]) -> None:
    path = tmp_path / "ledger.sqlite"  # both make the new file, too
    assert run_writers(path, {}, stages, "spawn") == 960
    assert Ledger(path).spending() == Spending(
        labels=90, verifier_calls=960, updates=120, generated_tokens=840, seconds=30.0
    )
    assert sum(Ledger(path).account(stage).position() for stage in set(stages)) == 240


def test_a_budget_shared_by_forked_processes_stops_at_exactly_the_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    limits = {"verifier_calls": 501.0}
    with Ledger(path, limits) as ledger:  # an open connection that the children inherit
        assert ledger.account("before").read_labels(["p"]) == 1
        assert run_writers(path, limits, ["a", "b"], "fork") == 500
        assert ledger.spending().verifier_calls == 501


def test_a_forked_child_may_use_the_parents_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    account = ledger.account("s")
    account.charge(updates=1)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=account.charge, kwargs={"updates": 2})
    child.start()
    child.join(timeout=60)
    account.charge(updates=4)
    assert child.exitcode == 0
    assert ledger.spending().updates == 7


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    account = ledger.account("s")

    def write() -> None:
        for _ in range(40):
            account.charge(updates=1)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert account.position() == ledger.spending().updates == 160


WRITER = """
import sys
from pathlib import Path
from headwater.ledger import Ledger
account = Ledger(Path(sys.argv[1])).account("s")
account.rewind(int(sys.argv[2]))
step = int(sys.argv[2]) // 2
while True:
    account.read_labels([f"p{step}"] * 4)
    account.charge(updates=1, seconds=0.1)
    step += 1
    print(account.position(), flush=True)
"""


def test_killed_at_any_instant_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    drawn = random.Random(0)
    checkpoint = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(path), str(checkpoint)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged = [int(writer.stdout.readline()) for _ in range(drawn.randint(5, 60))]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        account = Ledger(path).account("s")
        assert account.position() >= acknowledged[-1], "what was acknowledged is on disk"
        checkpoint = drawn.choice(acknowledged)
    account.rewind(checkpoint)
    straight = Ledger(tmp_path / "straight.sqlite")
    for step in range(checkpoint // 2):
        straight.account("s").read_labels([f"p{step}"] * 4)
        straight.account("s").charge(updates=1, seconds=0.1)
    assert Ledger(path).spending() == straight.spending(), "the same bits"
    assert Ledger(path).physical().updates > checkpoint // 2
