"""The label vault: charged before it answers, and silent otherwise."""

import copy
import pickle
from pathlib import Path

import pytest

from headwater.errors import BudgetExhausted, InputError
from headwater.ledger import Ledger
from headwater.types import Label, Verdict
from headwater.verify.vault import LabelsExhausted, LabelVault, VaultSealed
from headwater.verify.verifiers import make_verifier

LABELS = [Label("a", "17", "ten and seven"), Label("b", "18", "twice nine"), Label("c", "19")]
RIGHT = {"a": r"\boxed{17}", "b": r"\boxed{18}", "c": r"\boxed{19}"}


@pytest.fixture
def vault() -> LabelVault:
    return LabelVault(LABELS, make_verifier("math"))


def test_every_reading_is_charged(tmp_path: Path, vault: LabelVault) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    account = ledger.account("stage")
    requests = [("a", RIGHT["a"]), ("a", "no box"), ("b", r"\boxed{17}")]
    assert [grade.verdict for grade in vault.grade(account, requests)] == [
        Verdict.CORRECT, Verdict.UNPARSEABLE, Verdict.INCORRECT,
    ]  # fmt: skip
    spending = ledger.spending()
    assert (spending.labels, spending.verifier_calls) == (2, 3)


def test_a_budget_pays_for_exactly_its_number(tmp_path: Path, vault: LabelVault) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", {"verifier_calls": 2})
    with pytest.raises(BudgetExhausted) as caught:
        vault.grade(ledger.account("stage"), list(RIGHT.items()))
    assert isinstance(caught.value, LabelsExhausted)
    assert [grade.verdict for grade in caught.value.grades] == [Verdict.CORRECT, Verdict.CORRECT]
    assert "paid for 2 of 3" in str(caught.value)
    assert ledger.spending().verifier_calls == 2


def test_solutions_cost_labels_but_no_verifier_calls(tmp_path: Path, vault: LabelVault) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", {"labels": 1})
    account = ledger.account("stage")
    assert vault.solutions(account, ["a", "a"]) == ["ten and seven", "ten and seven"]
    with pytest.raises(LabelsExhausted) as caught:
        vault.solutions(account, ["a", "b"])
    assert caught.value.solutions == ["ten and seven"]
    spending = ledger.spending()
    assert (spending.labels, spending.verifier_calls) == (1, 0)


def test_what_cannot_be_answered_is_refused_uncharged(tmp_path: Path, vault: LabelVault) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    account = ledger.account("stage")
    with pytest.raises(InputError, match="'z' has no label"):
        vault.grade(account, [("a", RIGHT["a"]), ("z", RIGHT["a"])])
    with pytest.raises(InputError, match="'c' has no worked solution"):
        vault.solutions(account, ["a", "c"])
    assert ledger.spending().labels == 0
    with pytest.raises(InputError, match="'a' has two labels"):
        LabelVault([*LABELS, Label("a", "5")], make_verifier("exact"))


def test_no_answer_leaves_the_vault(vault: LabelVault) -> None:
    assert repr(vault) == "LabelVault(3 labels)"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(VaultSealed, match="cannot be copied"):
            leave(vault)
    assert not hasattr(vault, "__dict__")
