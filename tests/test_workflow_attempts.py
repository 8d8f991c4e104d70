"""Attempts at a stage, one at a time: whatever an attempt that was given up asks for is refused."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headwater.errors import BudgetExhausted, InputError, Interrupted, StageError
from headwater.ledger import Ledger
from headwater.types import Label
from headwater.workflow.attempt import RemoteAccount
from headwater.workflow.attempts import Attempts, Claim, Offer, Started
from headwater.workflow.cluster import connected
from headwater.workflow.messages import Done, Failed, Progress, WorkerSetup
from headwater.workflow.nodes import leave_token, look, require_alike, require_token
from headwater.workflow.store import ArtifactStore, seal_artifact

STAGE = "abc123"
FACTS = {"kind": "grpo", "parents": []}
LABELS = (Label("p1", "gold"),)


def attempts(run_dir: Path, retries: int = 1, **limits: float) -> Attempts:
    """The service of a run with one stage on offer."""
    found = Attempts(WorkerSetup(run_dir, "no:stage", limits=limits), retries)
    found.offer(Offer(STAGE, "grpo", "grpo on labels", LABELS))
    return found


def ask(service: Attempts, question: str, *arguments: Any) -> Any:
    """The answer's value, or its error raised."""
    reply = service.ask(question, *arguments)
    if isinstance(reply, Failed):
        raise reply.error()
    return reply.value


def claimed(service: Attempts) -> tuple[Claim, RemoteAccount]:
    """A claim of the stage, and the account its attempt charges."""
    claim = ask(service, "claim", STAGE)
    account = RemoteAccount(lambda *question: ask(service, *question), STAGE, claim.attempt)
    return claim, account


def spent(run_dir: Path) -> tuple[int, int]:
    """(updates that count, all that were made)."""
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        return ledger.spending().updates, ledger.physical().updates


def test_an_attempt_has_the_labels_and_is_charged_like_any_stage(tmp_path: Path) -> None:
    service = attempts(tmp_path, updates=5)
    claim, account = claimed(service)
    assert claim.labels == LABELS
    assert "gold" not in repr(claim)
    assert account.read_labels(["p1", "p1"]) == 2
    account.charge(updates=3, flops=0.5)
    account.observe_peak_memory(9)
    assert (account.position(), account.remaining("updates")) == (2, 2.0)
    with pytest.raises(BudgetExhausted, match=r"another 3 updates would pass the budget of 5"):
        account.charge(updates=3)
    account.rewind(1)
    assert (account.position(), account.remaining("updates")) == (1, 5.0)
    with pytest.raises(InputError, match="counter 'nonsense' does not exist"):
        account.charge(nonsense=1)
    assert spent(tmp_path) == (0, 6)


def test_the_next_attempt_takes_the_checkpoint_and_the_former_may_do_nothing(
    tmp_path: Path,
) -> None:
    service = attempts(tmp_path)
    first, old = claimed(service)
    old.charge(updates=2)
    (first.checkpoint_dir / "state").write_text("two steps")
    (first.output_dir / "half").write_text("kept, since a checkpoint vouches for it")
    second, new = claimed(service)
    assert (first.attempt, second.attempt) == (1, 2)
    assert (second.checkpoint_dir / "state").read_text() == "two steps"
    assert (second.output_dir / "half").exists()
    assert new.position() == 1, "rewinding is the stage's, which has a checkpoint"

    with pytest.raises(FileNotFoundError):
        (first.checkpoint_dir / "state").write_text("three steps")
    refused = "attempt 1 asks to charge or publish, but the stage is in attempt 2; .* is dropped"
    with pytest.raises(StageError, match=refused):
        old.charge(updates=1)
    for question in (
        ("statement", STAGE, 1),
        ("publish", STAGE, 1, first.output_dir, 1.0),
        ("fail", STAGE, 1, Failed("StageError", "cut off")),
        ("tell", STAGE, 1, Progress({"step": 3})),
        ("must_stop", STAGE, 1),
    ):
        with pytest.raises(StageError, match=refused):
            ask(service, *question)
    assert service.news() == [(STAGE, Started(1)), (STAGE, Started(2))]
    new.charge(updates=4)
    assert spent(tmp_path) == (6, 6)


def test_an_attempt_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    service = attempts(tmp_path)
    first, old = claimed(service)
    old.charge(updates=2)
    (first.output_dir / "half").write_text("x")
    second, new = claimed(service)
    assert list(second.output_dir.iterdir()) == []
    assert new.position() == 0
    assert spent(tmp_path) == (0, 2)


def test_a_published_stage_is_not_run_again_by_an_attempt_that_comes_later(tmp_path: Path) -> None:
    service = attempts(tmp_path)
    claim, account = claimed(service)
    account.charge(updates=4)
    (claim.output_dir / "weights").write_text("w")
    (claim.checkpoint_dir / "state").write_text("x")
    statement = ask(service, "statement", STAGE, 1)
    assert statement["totals"]["updates"] == 4
    seal_artifact(claim.output_dir, STAGE, FACTS)
    ask(service, "publish", STAGE, 1, claim.output_dir, 2.5)
    store = ArtifactStore(tmp_path)
    assert store.get(STAGE) is not None
    for folder in ("staging", "checkpoints"):
        assert list((tmp_path / folder).iterdir()) == []
    assert ask(service, "claim", STAGE) == Done(2.5)
    with pytest.raises(StageError, match="the stage has ended"):
        account.charge(updates=1)


def test_a_stage_that_failed_is_not_tried_again_and_one_may_be_lost_so_often(
    tmp_path: Path,
) -> None:
    service = attempts(tmp_path / "failed")
    claim, _ = claimed(service)
    (claim.checkpoint_dir / "state").write_text("x")
    ask(service, "fail", STAGE, 1, Failed("InputError", "value=3; expected 4; set it"))
    with pytest.raises(InputError, match="value=3"):
        claimed(service)
    assert (ArtifactStore(tmp_path / "failed").checkpoint_dir(STAGE) / "state").exists()

    service = attempts(tmp_path / "lost", retries=2)
    for _ in range(3):
        claimed(service)
    with pytest.raises(StageError, match=r"grpo on labels: its process was lost 3 times; .*most 2"):
        claimed(service)


def test_a_stop_reaches_those_who_run_and_keeps_others_from_starting(tmp_path: Path) -> None:
    service = attempts(tmp_path)
    service.offer(Offer("later", "opd", "opd", None))
    claimed(service)
    assert ask(service, "must_stop", STAGE, 1) is False
    assert service.stop([STAGE, "later"]) == ["later"]
    assert ask(service, "must_stop", STAGE, 1) is True
    with pytest.raises(Interrupted, match="stopped by the user"):
        ask(service, "claim", "later")


@pytest.mark.parametrize("orderly", [True, False])
def test_what_attempts_leave_is_where_any_later_run_looks(tmp_path: Path, orderly: bool) -> None:
    service = attempts(tmp_path)
    for step in (1, 2):
        claim, _ = claimed(service)
        (claim.checkpoint_dir / "state").write_text(f"{step}")
    (tmp_path / "checkpoints" / f"{STAGE}.1").mkdir()  # by an attempt that was cut off
    if orderly:
        service.close()
    store = ArtifactStore(tmp_path)
    store.tidy()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [STAGE]
    assert (store.checkpoint_dir(STAGE) / "state").read_text() == "2"
    assert store.begin(STAGE)


def test_a_node_that_sees_something_else_is_named_with_the_cure(tmp_path: Path) -> None:
    token = leave_token(tmp_path)
    here = look(tmp_path, Path.cwd(), "exact")
    require_alike(here, here, tmp_path, "n1")
    require_token(tmp_path, token)
    elsewhere = look(tmp_path / "other", Path.cwd(), "exact")
    with pytest.raises(InputError, match=r"node n1 \(.*\) has no such folder; .*storage that all"):
        require_alike(elsewhere, here, tmp_path, "n1")
    with pytest.raises(InputError, match="has another folder there; expected"):
        require_token(tmp_path, "another")
    older = replace(here, versions=here.versions | {"torch": "1.0"})
    with pytest.raises(InputError, match=r"has torch 1\.0 \(here .*\); expected the same versions"):
        require_alike(older, here, tmp_path, "n1")


def test_a_verifier_file_is_compared_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "reward.py").write_text(json.dumps(folder.name))
    monkeypatch.chdir(tmp_path)
    one, two = (look(tmp_path, folder, "reward:reward.py:f") for folder in folders)
    with pytest.raises(InputError, match=r"n1 .* has no verifier file as it is here; expected"):
        require_alike(two, one, tmp_path, "n1")


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with ExitStack() as stack, pytest.raises(InputError) as caught:
        connected("local", stack)
    assert str(caught.value) == (
        "--ray local: the package ray is not installed; expected it for runs on a cluster: "
        "pip install 'headwater[ray]'"
    )
