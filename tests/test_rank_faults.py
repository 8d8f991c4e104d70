"""Stages of two ranks that go wrong: told as of one process, in moments, and begun again."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from disk_faults import disk_full
from headwater.config.stages import SFTStage
from headwater.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from headwater.engine.ranks import Ranks, joined_world, leave_world
from headwater.errors import RankLost, StageError
from headwater.ledger import Ledger
from headwater.stages.job import StageContext, StageJob
from headwater.workflow.rank import Order, OutOfStep, follow, run_on_ranks
from rank_runs import start as start_rank
from stage_jobs import make_job
from test_workflow_run import FUNCTIONS, numbers, start
from workflow_stages import CRASH, FULL, run_stage

pytestmark = pytest.mark.slow
ARMS = {"arms": {"cold": {"student": ["grpo"]}}, "contrasts": []}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of single processes that nothing disturbed."""
    world = tmp_path_factory.mktemp("straight")
    start(world, **ARMS)
    return world


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (CRASH, "grpo on .*failed: KeyError: 'missing'"),
        (FULL, "grpo on .*no space left on the disk .*the same command"),
    ],
)
def test_an_error_that_is_not_ours_is_told_in_words(
    fault: str, words: str, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / fault).write_text("grpo")
    with pytest.raises(StageError, match=words):
        start(tmp_path, **ARMS, compute={"processes": 1, "ranks": 2})
    start(tmp_path, **ARMS, compute={"processes": 1, "ranks": 2})
    assert numbers(tmp_path) == numbers(straight)


def test_workers_at_once_take_gpus_of_their_own_and_listen_to_this_machine_alone(
    tmp_path: Path,
) -> None:
    start(
        tmp_path,
        compute={"processes": 2, "ranks": 2},
        functions=replace(FUNCTIONS, run_stage="test_rank_faults:say_place"),
    )
    assert set((tmp_path / "places.txt").read_text().splitlines()) == {"0 1", "2 3"}


def say_place(job: StageJob, context: StageContext) -> None:
    """A stage that says which GPUs its ranks would take."""
    places = context.world.gather(os.environ.get("LOCAL_RANK", "none"))
    assert context.world.size == 1 or os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    if context.world.size > 1 and context.world.is_main:
        with (job.output_dir.parents[2] / "places.txt").open("a") as said:
            said.write(" ".join(places) + "\n")
    run_stage(job, context)


def test_a_rank_that_dies_while_weights_are_gathered_is_a_lost_rank(tmp_path: Path) -> None:
    """Which is tried again, where any other error ends the stage for good."""
    started = [
        start_rank(Path(__file__), [str(tmp_path), "lose"], rank, 2, tmp_path) for rank in (0, 1)
    ]
    (said, _), _ = (process.communicate(timeout=120) for process in started)
    assert started[1].returncode == 9
    assert said.splitlines()[-1].startswith("lost: a rank of this stage is gone ("), said


def lose_one(job: StageJob, context: StageContext) -> None:
    """A stage whose second rank is gone when the first gathers weights."""
    assert isinstance(context.world, Ranks)
    whole = distribute_tensor(torch.ones(4, 2), context.world.mesh(torch.device("cpu")), [Shard(0)])
    context.world.gather(None)
    if not context.world.is_main:
        os._exit(9)
    whole.full_tensor()


def _lose(folder: Path) -> None:
    world = joined_world()
    if not world.is_main:
        follow()
    assert isinstance(world, Ranks)
    with Ledger(folder / "ledger.sqlite") as ledger:
        job = make_job("sft", SFTStage(), folder)
        context = StageContext(ledger.account("aa11"), None, lambda _: None, lambda: False)
        try:
            run_on_ranks(world, Order("test_rank_faults:lose_one", job, False, False), context)
        except OutOfStep as error:
            assert isinstance(error.__cause__, RankLost), repr(error.__cause__)
            print(f"lost: {error.__cause__}", flush=True)
    os._exit(0)


def test_all_ranks_raise_what_keeps_one_from_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    started = [start_rank(Path(__file__), [str(tmp_path)], rank, 2, tmp_path) for rank in (0, 1)]
    said = [process.communicate(timeout=120)[0].splitlines()[-2:] for process in started]
    assert said == [["no space left", "b is not there"]] * 2


def _save_and_read(folder: Path) -> None:
    """On every rank: say what comes of saving where the disk is full for one of them, and of
    reading a tensor that is not in the checkpoint."""
    world = joined_world()
    assert isinstance(world, Ranks)
    mesh = world.mesh(torch.device("cpu"))
    whole = distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])
    save_checkpoint(folder, 1, Checkpoint({"a": whole}, {"done": 1}), world)
    try:
        with disk_full(folder) if world.rank == 1 else nullcontext():
            save_checkpoint(folder, 2, Checkpoint({"a": whole}, {"done": 2}), world)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        print("no space left")
    found = load_checkpoint(folder)
    assert found is not None and found.state["done"] == 1
    try:
        found.read({"b": whole})
    except RuntimeError as error:
        assert "Missing key" in str(error)
        print("b is not there")
    leave_world()


if __name__ == "__main__":
    folder, *what = sys.argv[1:]
    _lose(Path(folder)) if what else _save_and_read(Path(folder) / "steps")
