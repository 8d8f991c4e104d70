"""Runs stages on several ranks, each a process of its own: `python rank_runs.py FILE` is one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from headwater.world import MEETING, World
from stage_jobs import Run


@dataclass(frozen=True)
class Part:
    """A run to start, and the step at which it is asked to stop."""

    run: Run
    stop_at: int | None = None


def run_on_ranks(parts: Sequence[Part], ranks: int, folder: Path) -> list[Run]:
    """The runs, one after another, on so many processes; each must end as it should."""
    folder.mkdir(parents=True)
    (folder / "parts.pickle").write_bytes(pickle.dumps(list(parts)))
    started = [
        start(Path(__file__), [str(folder / "parts.pickle")], rank, ranks, folder)
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
    return [part.run for part in parts]


def start(
    script: Path,
    arguments: Sequence[str],
    rank: int,
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] = {},
) -> subprocess.Popen[str]:
    """A script as one of several ranks that meet in `folder`."""
    own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), MEETING: str(folder / "meeting")}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=os.environ | own | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _main(file: str) -> None:
    from headwater.engine.ranks import joined_world, leave_world
    from headwater.errors import Interrupted

    parts: list[Part] = pickle.loads(Path(file).read_bytes())
    world = joined_world()
    parquet.write_table = partial(_after_a_moment, parquet.write_table)  # a slow disk
    for part in parts:
        try:
            if world.is_main:
                part.run.start(stop_at=part.stop_at, world=world)
            else:
                part.run.follow(world)
            assert part.stop_at is None, "it was to stop"
        except Interrupted:
            assert part.stop_at is not None, "nobody asked it to stop"
        _assert_all_written(part.run, world)
        assert world.all_ended()
    leave_world()


def _after_a_moment(write: Callable[..., None], *arguments: Any, **named: Any) -> None:
    time.sleep(0.1)
    write(*arguments, **named)


def _assert_all_written(run: Run, world: World) -> None:
    """No rank comes to the end of a stage before everything is written."""
    root = run.job.output_dir
    seen = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    first, *others = world.gather(seen)
    assert all(one == first for one in others), (run.job.kind, first, others)


if __name__ == "__main__":
    _main(sys.argv[1])
