"""A run's display that tells trackers as well.

Trackers are held by the run's own process, which hears of every stage wherever it runs; each stage
is followed in a thread of its own, so that a tracker that is slow keeps nobody waiting.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

from headwater.config.recipe import Recipe
from headwater.errors import InputError
from headwater.tracking.backends import (
    TrackedRun,
    flat,
    how_to_look,
    prepare,
    require_trackers,
)
from headwater.tracking.following import FollowedStage, TrackedLog, Trackers
from headwater.tracking.results import result_runs
from headwater.workflow.confinement import require_own_files
from headwater.workflow.graph import EVALUATES, Graph
from headwater.workflow.outcome import RunOutcome
from headwater.workflow.progress import ProgressView, WrappedView

TRACKERS_FOLDER = "trackers"
_THREAD = "trackers"
_SYNC_SECONDS = 1.0
_CLOSE_SECONDS = 60.0
_MOST_ARMS_NAMED = 2
_SLOW = (
    f"warning: trackers took longer than {_CLOSE_SECONDS:g} s to send the rest, expected them to "
    "be done by then; the same command again sends what is missing, and `wandb sync "
    "RUN/trackers/wandb/run-*` what wandb has and did not send"
)


def tracked(view: ProgressView, recipe: Recipe, run_dir: Path) -> ProgressView:
    """`view`, telling the recipe's trackers as well; as it is where there are none.

    Raises InputError for a tracker that cannot start here, before anything is trained.
    """
    if not recipe.report_to:
        return view
    require_trackers(recipe.report_to)
    return _TrackedView(view, recipe, run_dir.resolve())


def tracked_run(graph: Graph, study: str, fingerprint: str) -> TrackedRun:
    """What trackers call a stage: ARMS/KIND-POOL/seedN/FINGERPRINT."""
    node = graph.nodes[fingerprint]
    arms = graph.users[fingerprint] or ("base",)
    more = len(arms) - _MOST_ARMS_NAMED
    named = "+".join(arms[:_MOST_ARMS_NAMED]) + (f"+{more}" if more > 0 else "")
    what = f"{node.kind}-{node.pool}" if node.pool else f"{node.kind}-{node.model_name}"
    name = f"{named}/{what.replace(':', '-')}/seed{node.seed}/{fingerprint[:8]}"
    tags = (*arms, node.kind, node.model_name, f"seed{node.seed}")
    config = {
        "kind": node.kind,
        "model": node.model_name,
        "role": node.role,
        "pool": node.pool,
        "seed": node.seed,
        "fingerprint": fingerprint,
        **node.config,
    }
    return TrackedRun(study, name, node.kind, tuple(dict.fromkeys(tags)), flat(config))


def open_folder(run_dir: Path) -> Path:
    """RUN/trackers. Raises InputError where a link of it leads elsewhere.

    wandb's own folder has links, to what lies beside them; nothing of it is read.
    """
    folder = run_dir / TRACKERS_FOLDER
    for place in (folder, folder / "wandb"):
        if place.is_symlink():
            raise InputError(
                f"{place} is a link, expected a folder of this run's own; remove it, and run again"
            )
    require_own_files(folder, ("sent", "tensorboard", "trackio", "mlflow"))
    return folder


def tell_results(view: ProgressView, outcome: RunOutcome) -> None:
    """Tell the trackers of a `tracked` view what each arm came to; nothing of any other."""
    if isinstance(view, _TrackedView):
        view.tell_results(outcome)


class _WithoutGreetings:
    """stdout without what trackers print there: it belongs to results."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name == _THREAD:
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _silence() -> Iterator[None]:
    """While threads of trackers run."""
    with redirect_stdout(cast(TextIO, _WithoutGreetings(sys.stdout))):
        yield


@contextmanager
def _warning_of(say: Callable[[str], None]) -> Iterator[None]:
    """A file of the run that cannot be read or written ends no run."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(
            f"warning: what trackers are told cannot be read or kept ({error}), expected "
            "metrics.jsonl as a stage writes it, and RUN/trackers/sent as it was left; the run "
            "goes on without"
        )


class _TrackedView(WrappedView):
    """Another view, and trackers that are told from the files of the stages."""

    def __init__(self, view: ProgressView, recipe: Recipe, run_dir: Path) -> None:
        super().__init__(view)
        self._recipe, self._run_dir = recipe, run_dir
        self._trackers = Trackers(recipe.report_to, open_folder(run_dir), view.say)
        self._followers: dict[str, _Follower] = {}
        self._slow = False  # some tracker was not waited for any longer
        self._leaving = ExitStack()

    def found(self, published: int) -> None:
        """Tell of stages that were published before what their trackers were not told yet."""
        super().found(published)
        artifacts = self._run_dir / "artifacts"
        done = [stage for stage in self.graph.nodes if (artifacts / stage).is_dir()]
        self._follow("", [stage for stage in done if self._is_tracked(stage)]).end()

    def started(self, fingerprint: str) -> None:
        """Follow the stage, from where it was left if it was lost."""
        super().started(fingerprint)
        if self._is_tracked(fingerprint) and fingerprint not in self._followers:
            self._follow(fingerprint, [fingerprint])

    def finished(self, fingerprint: str, seconds: float) -> None:
        """Tell the stage's last steps."""
        super().finished(fingerprint, seconds)
        if fingerprint in self._followers:
            self._followers[fingerprint].end()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.view)
            stack.enter_context(_silence())
            prepare(self._recipe.report_to, self._trackers.folder)
            for name in self._recipe.report_to:
                self.say(f"{name}: {how_to_look(name, self._trackers.folder)}")
            stack.callback(self._end)
            self._leaving = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving.__exit__(exc_type, exc, traceback)

    def tell_results(self, outcome: RunOutcome) -> None:
        """avg@k and pass@k of each arm with standard errors; waits, but not for ever."""
        if self._slow:
            return

        def tell() -> None:
            for key, run, values in result_runs(outcome, self._recipe.name):
                with (
                    _warning_of(self.say),
                    closing(TrackedLog(self._trackers, run, key)) as log,
                ):
                    log.summary(values)

        with _silence():
            thread = threading.Thread(target=tell, daemon=True, name=_THREAD)
            thread.start()
            thread.join(_CLOSE_SECONDS)
        if thread.is_alive():
            self.say(_SLOW)

    def _end(self) -> None:
        """Wait for every tracker, but not for ever."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for follower in self._followers.values():
            follower.end()
        for follower in self._followers.values():
            follower.join(max(0.0, deadline - time.monotonic()))
        self._slow = any(follower.is_alive() for follower in self._followers.values())
        if self._slow:
            self.say(_SLOW)

    def _is_tracked(self, fingerprint: str) -> bool:
        return self.graph.nodes[fingerprint].kind not in EVALUATES | {"source"}

    def _follow(self, key: str, stages: list[str]) -> _Follower:
        study, every = self._recipe.name, self._recipe.log_completions

        def followed(stage: str) -> FollowedStage:
            log = TrackedLog(self._trackers, tracked_run(self.graph, study, stage), stage)
            return FollowedStage(self._run_dir, stage, log, every)

        follower = _Follower([partial(followed, stage) for stage in stages], self.say)
        self._followers[key] = follower
        follower.start()
        return follower


class _Follower(threading.Thread):
    """Follows stages, one after another: each until `end` is called, then for a last time."""

    def __init__(self, stages: list[Callable[[], FollowedStage]], say: Callable[[str], None]):
        super().__init__(daemon=True, name=_THREAD)
        self._stages, self._say = stages, say
        self._ended = threading.Event()

    def end(self) -> None:
        """Nothing more is being written."""
        self._ended.set()

    def run(self) -> None:
        """Look once a second."""
        for follow in self._stages:
            with _warning_of(self._say), closing(follow()) as stage:
                while not self._ended.wait(_SYNC_SECONDS):
                    stage.sync()
