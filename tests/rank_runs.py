"""Runs stages on several ranks, each a process of its own: `python rank_runs.py FILE` is one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.world import MEETING
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
    for part in parts:
        try:
            if world.is_main:
                part.run.start(stop_at=part.stop_at, world=world)
            else:
                part.run.follow(world)
            assert part.stop_at is None, "it was to stop"
        except Interrupted:
            assert part.stop_at is not None, "nobody asked it to stop"
        assert world.all_ended()
    leave_world()


if __name__ == "__main__":
    _main(sys.argv[1])
