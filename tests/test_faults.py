"""A run is never lost: each fault of disk, files and processes, and what becomes of the run."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from disk_faults import denied, disk_full, no_renames
from headwater.config.loading import validate_recipe
from headwater.errors import HeadwaterError, InputError, StageError
from headwater.evals.batches import FinishedBatches
from headwater.ledger import Ledger
from headwater.ledger.statement import check_ledger, closing_statement
from headwater.storage import sealed, unsealed, write_whole
from headwater.types import Problem
from headwater.workflow.executor import Executor
from headwater.workflow.launch import WorkerProcess, launch_worker
from headwater.workflow.messages import WorkerSetup
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.record import read_record
from headwater.workflow.run import run_study
from headwater.workflow.store import ArtifactStore
from test_workflow_run import FUNCTIONS, RECIPE, numbers, start
from test_workflow_store import publish
from torture.faults import flip
from workflow_stages import FULL, VANISH

ARMS = {"arms": {"cold": {"student": ["grpo"]}}, "contrasts": []}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that nothing disturbed."""
    world = tmp_path_factory.mktemp("straight")
    start(world, **ARMS)
    return world


@pytest.fixture
def world(straight: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- a full disk ---------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")
    words = r"results\.json.*no space left on the disk \(.* free\); free some and run the same"
    with disk_full(tmp_path), pytest.raises(StageError, match=words):
        write_whole(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["grpo", "pretrain"])
def test_a_disk_that_fills_up_fails_the_stage_in_words(
    kind: str, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / FULL).write_text(kind)
    with pytest.raises(StageError, match=f"{kind} o.*no space left on the disk .*the same command"):
        start(tmp_path, **ARMS)
    start(tmp_path, **ARMS)
    assert numbers(tmp_path) == numbers(straight)


def test_a_disk_that_is_full_from_the_start_is_told_and_nothing_is_lost(
    straight: Path, tmp_path: Path
) -> None:
    with disk_full(tmp_path / "run"), pytest.raises(StageError, match="no space left") as caught:
        start(tmp_path, **ARMS)
    assert caught.value.exit_code == 1
    start(tmp_path, **ARMS)
    assert numbers(tmp_path) == numbers(straight)


def test_a_full_disk_leaves_the_ledger_sound(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        account = ledger.account("aa11")
        account.charge(updates=1)
        db = ledger._connection()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StageError, match=r"full; it must be .* space left \(.* free\)"):
            account.read_labels([f"a-long-name-of-a-problem-{n}" for n in range(2000)])
        check_ledger(ledger)
        assert (ledger.spending().updates, ledger.spending().labels) == (1, 0)
        db.execute("PRAGMA max_page_count = 100000")
        assert account.read_labels(["p1"]) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left_bytes", [0, 60_000, 200_000, 300_000])
def test_a_really_full_disk(left_bytes: int, small_disk: Path, straight: Path) -> None:
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(small_disk).free
        file.write(b"0" * (free - left_bytes))
    with pytest.raises(StageError, match="space left"):
        start(small_disk, **ARMS)
    filler.unlink()
    start(small_disk, **ARMS)
    assert numbers(small_disk) == numbers(straight)


# --- damaged files -------------------------------------------------------------------------------


def test_a_changed_manifest_is_damage_and_an_unsealed_one_is_read(tmp_path: Path) -> None:
    path = publish(ArtifactStore(tmp_path)) / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"seconds": 1.5', '"seconds": 9.5'))
    damage = ArtifactStore(tmp_path).find_damage("aa11")
    assert damage is not None
    assert "differs from its seal" in damage.reason
    plain = unsealed(json.loads(text))
    path.write_text(json.dumps(plain))  # as older versions wrote it
    assert ArtifactStore(tmp_path).find_damage("aa11") is None


def test_a_seal_vouches_for_every_character() -> None:
    text = json.dumps(sealed({"steps": [1, 2.5, None], "name": "grpo"}))
    assert unsealed(json.loads(text)) == {"steps": [1, 2.5, None], "name": "grpo"}
    for old, new in (("2.5", "2.4"), ("grpo", "grpq"), ("null", "true"), ('"name"', '"nane"')):
        with pytest.raises(ValueError, match=r"differs from its seal"):
            unsealed(json.loads(text.replace(old, new)))


def test_a_changed_record_of_a_run_is_refused(world: Path) -> None:
    path = world / "run" / "run.json"
    path.write_text(path.read_text().replace('"name": "small"', '"name": "smell"'))
    with pytest.raises(InputError, match=r"differs from its seal.*run the recipe again"):
        read_record(world / "run")
    start(world, **ARMS)
    assert read_record(world / "run").name == "small"


def test_a_flipped_bit_anywhere_in_a_batch_is_found(tmp_path: Path) -> None:
    problems = (Problem("p1", "1+1", "test"), Problem("p2", "1+2", "test"))
    table = pa.table({"problem_id": ["p1", "p2"], "attempt": [0, 0], "verdict": ["a", "b"]})
    batches = FinishedBatches(tmp_path)
    batches.add(0, table, ledger_position=3, seconds=1.25)
    assert batches.load(problems, 1).ledger_position == 3
    (path,) = tmp_path.iterdir()
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        path.write_bytes(content)
        flip(path, draw)
        assert batches.load(problems, 1).tables == ()
    path.write_bytes(content[:-1])
    assert batches.load(problems, 1).tables == ()


def test_what_a_killed_run_left_behind_is_removed(world: Path) -> None:
    run = world / "run"
    finished = next((run / "artifacts").iterdir())
    shutil.copytree(finished, run / "checkpoints" / finished.name)
    shutil.copytree(finished, run / "staging" / finished.name)
    for folder in ("artifacts", "staging", "checkpoints"):
        (run / folder / "aa11.removed").mkdir()
    before = numbers(world)
    start(world, **ARMS)
    assert list((run / "staging").iterdir()) == list((run / "checkpoints").iterdir()) == []
    assert not list((run / "artifacts").glob("*.removed"))
    assert numbers(world) == before


# --- the ledger ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE entries SET updates = updates + 1", "not the sum of its entries"),
        ("UPDATE accounts SET verifier_calls = 3", "not the sum of its entries"),
        ("DELETE FROM entries WHERE seq = 1", "follows entry"),
        ("UPDATE labels SET first_seq = 10000", "which does not exist"),
        ("UPDATE entries SET state = 'alive' WHERE seq = 1", "in state 'alive'"),
        ("UPDATE entries SET account = 999 WHERE id = 1", "an entry of no account"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(world: Path, statement: str, found: str) -> None:
    db = sqlite3.connect(world / "run" / "ledger.sqlite")
    db.execute(statement)
    db.commit()
    db.close()
    with pytest.raises(InputError, match=f"damaged .*{found}.*a copy of it back, or move"):
        start(world, **ARMS)


def test_a_flipped_bit_in_the_ledger_is_an_error_or_changes_no_number(world: Path) -> None:
    path = world / "run" / "ledger.sqlite"
    content, draw = path.read_bytes(), random.Random(0)

    def spent() -> str:
        with Ledger(path) as ledger:
            check_ledger(ledger)
            found = [ledger.spending(kind=kind).as_dict() for kind in ("train", "eval")]
            return str([one | {"peak_memory_bytes": 0} for one in found])

    before, refused = spent(), 0
    for _ in range(150):
        for leftover in world.glob("run/ledger.sqlite-*"):
            leftover.unlink()
        path.write_bytes(content)
        flip(path, draw)
        try:
            assert spent() == before
        except HeadwaterError as error:
            assert "move" in str(error) or "free it" in str(error)
            refused += 1
    assert refused > 20


def test_a_lost_ledger_is_made_again_from_what_stages_stated(world: Path) -> None:
    before = numbers(world)
    damaged = world / "run" / "ledger.sqlite"
    damaged.write_bytes(b"no ledger" * 1000)
    with pytest.raises(InputError, match=r"move ledger\.sqlite"):
        start(world, **ARMS)
    damaged.unlink()
    start(world, **ARMS)
    assert numbers(world) == before


def test_an_older_copy_of_the_ledger_is_completed(world: Path) -> None:
    before = numbers(world)
    with Ledger(world / "run" / "ledger.sqlite") as ledger:
        stages = [
            path.name
            for path in (world / "run" / "artifacts").iterdir()
            if (found := closing_statement(ledger, path.name, "train")) is not None
            and found.totals["verifier_calls"]
        ]
        for stage in stages:
            ledger.account(stage).rewind(1)
    assert stages
    assert numbers(world) != before
    start(world, **ARMS)
    assert numbers(world) == before


# --- artifacts while a run goes on ---------------------------------------------------------------


def test_an_artifact_that_vanishes_fails_its_reader_in_words(tmp_path: Path) -> None:
    arms = {"cold": {"student": ["grpo"]}, "base": {"student": []}}
    settings = {"arms": arms, "contrasts": [], "compute": {"processes": 1}}
    whole = tmp_path / "whole"
    whole.mkdir()
    start(whole, **settings)
    (tmp_path / VANISH).write_text("grpo")  # removes the base that is evaluated after it
    with pytest.raises(StageError, match=r"what evaluate on held_out .* reads is gone; leave the"):
        start(tmp_path, **settings)
    start(tmp_path, **settings)
    assert numbers(tmp_path) == numbers(whole)


def test_an_unreadable_artifact_is_told_and_kept(world: Path) -> None:
    artifact = next(p for p in (world / "run" / "artifacts").iterdir() if (p / "model").is_dir())
    with denied(artifact), pytest.raises(StageError, match=r"permission denied; .*chmod -R u\+rwX"):
        start(world, **ARMS)
    assert artifact.is_dir()
    before = numbers(world)
    start(world, **ARMS)
    assert numbers(world) == before


# --- workers -------------------------------------------------------------------------------------


def test_a_worker_that_dies_while_starting_says_why(tmp_path: Path) -> None:
    def launch(setup: WorkerSetup, descriptor: int, log: Path) -> WorkerProcess:
        with log.open("wb") as said:
            return subprocess.Popen([sys.executable, "-c", "exit('no such module')"], stderr=said)

    study = prepare_study(validate_recipe(RECIPE | ARMS))
    view = ProgressView(study.graph)
    with pytest.raises(StageError, match="worker ended with code 1, saying: no such module"):
        run_study(study, tmp_path / "run", view=view, functions=FUNCTIONS, launch=launch)


def test_a_worker_that_dies_idle_is_replaced(tmp_path: Path) -> None:
    started: list[WorkerProcess] = []

    def launch(setup: WorkerSetup, descriptor: int, log: Path) -> WorkerProcess:
        started.append(launch_worker(setup, descriptor, log))
        return started[-1]

    study = prepare_study(validate_recipe(RECIPE | ARMS))
    setup = WorkerSetup(run_dir=tmp_path, run_stage=FUNCTIONS.run_stage)
    view = ProgressView(study.graph)
    with Executor(study.graph, setup, 1, lambda _: None, view, launch) as executor:
        first = executor.call("os:getpid")
        assert executor.call("os:getpid") == first
        started[0].kill()
        started[0].wait()
        assert executor.call("os:getpid") != first
    assert os.getpid() != first


def test_under_torchrun_a_worker_has_time_to_let_the_other_ranks_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started for that where nothing is left to do, and killed they would wait for ever."""
    monkeypatch.setattr("headwater.workflow.executor.launched_rank", lambda: 0)
    patience: list[float | None] = []

    def launch(setup: WorkerSetup, descriptor: int, log: Path) -> WorkerProcess:
        process = launch_worker(setup, descriptor, log)
        waited = process.wait

        def wait(timeout: float | None = None) -> int:
            patience.append(timeout)
            return waited(timeout)

        monkeypatch.setattr(process, "wait", wait)
        return process

    study = prepare_study(validate_recipe(RECIPE | ARMS))
    setup = WorkerSetup(run_dir=tmp_path, run_stage=FUNCTIONS.run_stage)
    with Executor(study.graph, setup, 1, lambda _: None, ProgressView(study.graph), launch):
        pass
    assert patience and min(p for p in patience if p) >= 60


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_saved_again_at_its_step_never_leaves_the_folder_without_one(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    from headwater.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, Checkpoint({"x": torch.tensor([value])}, {"done": value}))
    with no_renames(tmp_path), pytest.raises(OSError):
        save_checkpoint(tmp_path, 5, Checkpoint({"x": torch.tensor([3.0])}, {"done": 3.0}))
    found = load_checkpoint(tmp_path)
    assert found is not None
    x = torch.zeros(1)
    found.read({"x": x})
    assert (found.state["done"], x.item()) == (2.0, 2.0)
    with disk_full(tmp_path), pytest.raises(OSError):
        save_checkpoint(tmp_path, 6, Checkpoint({"x": torch.tensor([3.0])}, {"done": 3.0}))
    again = load_checkpoint(tmp_path)
    assert again is not None
    assert again.state["done"] == 2.0
    save_checkpoint(tmp_path, 6, Checkpoint({"x": torch.tensor([4.0])}, {"done": 4.0}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000006"]
