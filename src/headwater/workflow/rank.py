"""The ranks of a stage that the run does not talk to: they follow the worker, which is rank 0."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from headwater.errors import HeadwaterError
from headwater.redaction import redact
from headwater.stages.job import StageContext, StageJob
from headwater.stages.ranks import context_of_rank
from headwater.workflow.stage_run import load_function

if TYPE_CHECKING:
    from headwater.engine.ranks import Ranks

#: An error that all ranks have, they have within moments of each other; one rank's own is told
#: once so long has passed.
_ERROR_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Order:
    """A stage for all ranks, as the main one tells it; labels stay where they are."""

    run_stage: str
    job: StageJob
    has_vault: bool
    strict: bool


def run_on_ranks(world: Ranks, order: Order, context: StageContext) -> None:
    """Run a stage as the main rank, with all others. Raises what it raises on the main rank.

    An error that all ranks end with leaves them ready for the next stage. Raises OutOfStep, from
    the error if there was one (RankLost where it says so), where some do not come to the end.
    """
    world.from_main(lambda: order)
    try:
        _run(world, order, context)
    except Exception as error:
        if not world.all_ended(_ERROR_SECONDS):
            raise OutOfStep(str(error)) from (world.loss_in(error) or error)
        raise
    if not world.all_ended():
        raise OutOfStep("a rank did not come to the end of the stage")


class OutOfStep(Exception):
    """Ranks are out of step: this process can run no other stage."""


def dismiss(world: Ranks) -> None:
    """Let the other ranks go."""
    world.from_main(lambda: None)
    import_module("headwater.engine.ranks").leave_world()


def follow(lifeline: int | None = None) -> None:
    """Serve as a rank other than the main one until that lets go, or ends.

    lifeline: a descriptor whose other end the run holds; when that closes, so does this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it to all: the main one saves
    if lifeline is not None:
        threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    ranks = import_module("headwater.engine.ranks")
    world: Ranks = ranks.joined_world()
    while (order := world.from_main(_never)) is not None:
        try:
            _run(world, order, None)
        except HeadwaterError as error:
            print(f"rank {world.rank}: {error}", file=sys.stderr)
        except Exception:
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
        if not world.all_ended():
            os._exit(1)
    ranks.leave_world()


def _run(world: Ranks, order: Order, context: StageContext | None) -> None:
    ranked = context_of_rank(world, context, has_vault=order.has_vault, strict=order.strict)
    load_function(order.run_stage)(order.job, ranked)


def _never() -> Order | None:
    raise AssertionError("the main rank gives orders")


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
