"""The ledger's values: prices of labels, rewinding, budgets, refusals."""

from __future__ import annotations

import gc
import pickle
import sqlite3
import sys
from pathlib import Path

import pytest

from headwater.errors import BudgetExhausted, InputError, StageError
from headwater.ledger import COUNTERS, Ledger, Spending


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.sqlite"


def test_eight_rollouts_of_a_problem_are_eight_verifier_calls_and_one_label(path: Path) -> None:
    ledger = Ledger(path)
    account = ledger.account("grpo-a")
    assert account.read_labels(["p1"] * 8 + ["p2"] * 8) == 16
    assert ledger.spending() == Spending(labels=2, verifier_calls=16)


def test_worked_solutions_cost_labels_and_no_verifier_calls(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.account("sft").read_labels(["p1", "p2"], verifier_calls_each=0) == 2
    assert ledger.spending() == Spending(labels=2)


def test_every_counter_is_summed_and_memory_is_the_largest(path: Path) -> None:
    ledger = Ledger(path)
    account = ledger.account("s")
    amounts = {name: index + 1 for index, name in enumerate(COUNTERS) if name != "verifier_calls"}
    account.charge(**amounts)
    account.charge(**amounts)
    account.observe_peak_memory(300)
    account.observe_peak_memory(200)
    spent = ledger.spending().as_dict()
    assert {name: spent[name] for name in amounts} == {n: 2 * a for n, a in amounts.items()}
    assert spent["peak_memory_bytes"] == 300
    assert isinstance(spent["updates"], int) and isinstance(spent["flops"], float)


def test_labels_shared_by_stages_count_once_over_them(path: Path) -> None:
    ledger = Ledger(path)
    ledger.account("teacher").read_labels(["p1", "p2"])
    ledger.account("student").read_labels(["p2", "p3"])
    assert ledger.spending(["teacher"]).labels == 2
    assert ledger.spending(["teacher", "student"]).labels == 3
    assert ledger.spending(["never-run"]) == Spending()
    with pytest.raises(InputError, match="one string"):
        ledger.spending("teacher")


def test_rewound_entries_are_physical_and_no_longer_logical(path: Path) -> None:
    ledger = Ledger(path)
    account = ledger.account("s")
    account.read_labels(["p1"])
    account.charge(updates=1, seconds=0.1)
    saved = account.position()
    account.read_labels(["p1", "p2"])
    account.charge(updates=1, seconds=0.2)
    account.rewind(saved)
    assert account.position() == saved == 2
    assert ledger.spending() == Spending(labels=1, verifier_calls=1, updates=1, seconds=0.1)
    account.read_labels(["p1", "p3"])
    account.charge(updates=1, seconds=0.2)
    assert account.position() == 4
    assert ledger.spending() == Spending(labels=2, verifier_calls=3, updates=2, seconds=0.1 + 0.2)
    physical = ledger.physical()
    assert (physical.labels, physical.verifier_calls, physical.updates) == (3, 5, 3)
    assert physical.seconds == pytest.approx(0.5, abs=1e-15)


def test_rewinding_leaves_other_stages_and_evaluation_alone(path: Path) -> None:
    ledger = Ledger(path)
    for account in (ledger.account("a"), ledger.account("b"), ledger.account("a", "eval")):
        account.read_labels(["p"])
        account.charge(updates=1)
    ledger.account("a").rewind(0)
    assert ledger.spending(["a"]) == Spending()
    assert ledger.spending(["b"]) == Spending(labels=1, verifier_calls=1, updates=1)
    assert ledger.spending(kind="eval") == Spending(labels=1, verifier_calls=1, updates=1)


def test_a_position_beyond_the_account_says_what_to_do(path: Path) -> None:
    account = Ledger(path).account("grpo-a")
    account.charge(updates=1)
    with pytest.raises(StageError, match=r"position 2.*1 entries.*restore the ledger"):
        account.rewind(2)
    assert account.position() == 1


def test_the_label_budget_stops_at_exactly_the_number(path: Path) -> None:
    ledger = Ledger(path, {"labels": 3})
    account = ledger.account("s")
    assert account.remaining("labels") == 3
    assert account.read_labels(["p1", "p1", "p2", "p3", "p3", "p4", "p1"]) == 5
    assert account.read_labels(["p4"]) == 0
    assert account.read_labels(["p1", "p3"]) == 2, "a label already paid for stays readable"
    assert ledger.account("other").read_labels(["p2", "p9", "p2"]) == 1
    assert ledger.spending().labels == 3
    assert account.remaining("labels") == 0


def test_the_verifier_call_budget_stops_at_exactly_the_number(path: Path) -> None:
    ledger = Ledger(path, {"verifier_calls": 10})
    assert ledger.account("a").read_labels(["p"] * 7) == 7
    assert ledger.account("b").read_labels(["q"] * 7) == 3
    assert ledger.account("b").read_labels(["q"]) == 0
    assert ledger.account("c").read_labels(["r"], verifier_calls_each=0) == 1
    assert ledger.spending().verifier_calls == 10


def test_a_charge_past_the_budget_is_refused_whole_and_kept_as_physical(path: Path) -> None:
    ledger = Ledger(path, {"updates": 2, "generated_tokens": 100})
    account = ledger.account("s")
    account.charge(updates=1, generated_tokens=60)
    account.charge(updates=1)
    with pytest.raises(BudgetExhausted, match=r"budget of 100; raise budget\.generated_tokens"):
        account.charge(generated_tokens=41, prompts=4)
    account.charge(generated_tokens=40)
    with pytest.raises(BudgetExhausted, match=r"budget\.updates"):
        account.charge(updates=1)
    assert ledger.spending() == Spending(updates=2, generated_tokens=100)
    assert ledger.physical() == Spending(updates=3, generated_tokens=141, prompts=4)
    assert account.position() == 3


def test_evaluation_is_free_of_the_budget(path: Path) -> None:
    ledger = Ledger(path, {"labels": 1, "verifier_calls": 1, "updates": 0})
    account = ledger.account("m", "eval")
    assert account.read_labels(["p1", "p2", "p3"]) == 3
    account.charge(updates=5)
    assert ledger.spending() == Spending()
    assert ledger.account("m").read_labels(["p1", "p2"]) == 1


def test_rewinding_gives_the_budget_back(path: Path) -> None:
    account = Ledger(path, {"labels": 2, "verifier_calls": 4}).account("s")
    assert account.read_labels(["p1", "p2", "p1", "p2", "p1"]) == 4
    account.rewind(0)
    assert account.read_labels(["p3", "p4"]) == 2


def test_a_budget_below_what_was_spent_grants_nothing(path: Path) -> None:
    Ledger(path).account("s").read_labels(["p1", "p2", "p3"])
    account = Ledger(path, {"labels": 2, "verifier_calls": 2}).account("s")
    assert account.remaining("labels") == account.remaining("verifier_calls") == 0
    assert account.read_labels(["p1"]) == 0


@pytest.mark.parametrize(
    ("amounts", "says"),
    [
        ({"token": 1}, "'token' does not exist; use one of"),
        ({"verifier_calls": 1}, "charged by read_labels"),
        ({"updates": -1}, "updates=-1; expected a finite amount"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"updates": 1.5}, "updates=1.5; expected a whole number"),
    ],
)
def test_bad_amounts_are_refused_and_nothing_is_charged(
    path: Path, amounts: dict[str, float], says: str
) -> None:
    ledger = Ledger(path)
    with pytest.raises(InputError, match=says):
        ledger.account("s").charge(prompts=1, **amounts)
    assert ledger.physical() == Spending()


def test_bad_limits_and_names_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match="budget 'label' is not counted"):
        Ledger(path, {"label": 3})
    with pytest.raises(InputError, match="budget labels=-1 is negative"):
        Ledger(path, {"labels": -1})
    with pytest.raises(InputError, match="'tokens' is not counted"):
        Ledger(path).account("s").remaining("tokens")
    with pytest.raises(InputError, match="verifier_calls_each=-1"):
        Ledger(path).account("s").read_labels(["p"], verifier_calls_each=-1)


def test_files_that_are_not_ledgers_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(InputError, match=r"notes\.txt.*expected a headwater ledger"):
        Ledger(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE things (x)")
    with pytest.raises(InputError, match=r"foreign\.sqlite is not a ledger of version 1"):
        Ledger(foreign)


def test_a_pickled_ledger_is_the_same_ledger(path: Path) -> None:
    ledger = Ledger(path, {"updates": 1})
    copy = pickle.loads(pickle.dumps(ledger))
    copy.account("s").charge(updates=1)
    assert copy.limits == {"updates": 1}
    assert ledger.spending().updates == 1


def test_a_failure_inside_a_charge_leaves_nothing_half_done(path: Path) -> None:
    ledger = Ledger(path)
    account = ledger.account("s")
    account.charge(updates=1)
    with pytest.raises(sqlite3.Error):
        account.read_labels(["p1", object(), "p2"])  # type: ignore[list-item]
    assert account.position() == 1
    assert ledger.physical() == Spending(updates=1)
    account.read_labels(["p1"])
    assert account.position() == 2


def test_a_budget_over_some_stages_leaves_the_others_out(path: Path) -> None:
    earlier = Ledger(path).account("earlier")
    earlier.read_labels(["p1", "p2", "p3"])
    earlier.charge(updates=9)
    ledger = Ledger(path, {"labels": 2, "verifier_calls": 5, "updates": 4}, ["a", "b"])
    a, b = ledger.account("a"), ledger.account("b")
    assert (a.remaining("labels"), a.remaining("updates")) == (2, 4)
    assert a.read_labels(["p1", "p2", "p3"]) == 2, "p1 is new to these stages"
    a.charge(updates=3)
    assert b.read_labels(["p2", "p1", "p3"]) == 2
    with pytest.raises(BudgetExhausted):
        b.charge(updates=2)
    other = ledger.account("other")
    assert other.read_labels(["p4"] * 9) == 9
    other.charge(updates=100)
    assert ledger.spending(["a", "b"]) == Spending(labels=2, verifier_calls=4, updates=3)
    assert ledger.physical(stages=["a", "b"]).updates == 5
    assert pickle.loads(pickle.dumps(ledger)).account("a").remaining("updates") == 1


def test_stages_without_an_account_are_named(path: Path) -> None:
    ledger = Ledger(path)
    ledger.account("trained")
    ledger.account("evaluated", "eval")
    assert ledger.without_account(["trained", "lost", "evaluated"]) == ("lost",)


def test_a_reading_that_an_interrupt_left_open_ends_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    reading = ledger._snapshot()
    reading.__enter__()
    ledger.close()
    del reading
    gc.collect()
    assert said == []
