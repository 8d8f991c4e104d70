"""What a caller's own functions are told while stages run, in the caller's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headwater.workflow.progress import ProgressView, WrappedView


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a stage.

    name: "start", "step" (of training, or a batch of what is sampled), "evaluate" (a batch of an
    evaluation), "warning" (an alert, in `words`) or "end". kind: the stage's, such as "grpo";
    stage: its fingerprint. step: how many are done, of `total`; where stages are tasks of a cluster
    a few steps a second are told. metrics: numbers by name, those of the step; with "end" those of
    the last one.
    """

    name: Literal["start", "step", "evaluate", "warning", "end"]
    kind: str
    stage: str
    step: int = 0
    total: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    words: str = ""


#: Told every event. What returns True stops the run: every stage in hand saves itself, and the
#: same call continues. What it raises ends the run at once.
Callback = Callable[[Event], object]


def with_callbacks(view: ProgressView, callbacks: Sequence[Callback]) -> ProgressView:
    """The view, and the callbacks beside it where there are any."""
    return CallbackView(view, callbacks) if callbacks else view


_NO_METRICS = frozenset({"step", "total"})


class CallbackView(WrappedView):
    """Another view, and callbacks beside it."""

    def __init__(self, view: ProgressView, callbacks: Sequence[Callback]) -> None:
        super().__init__(view)
        self._callbacks = tuple(callbacks)
        self._stops = False

    @property
    def every_step(self) -> bool:
        """Callbacks are told every step."""
        return True

    @property
    def stop_requested(self) -> bool:
        """Whether a callback returned True."""
        return self._stops or super().stop_requested

    def started(self, fingerprint: str) -> None:
        """A worker took the stage in hand."""
        super().started(fingerprint)
        self._tell("start", fingerprint)

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """The stage in hand measured something."""
        super().progressed(fingerprint, values)
        evaluates = self.graph.nodes[fingerprint].is_evaluation
        self._tell("evaluate" if evaluates else "step", fingerprint)

    def finished(self, fingerprint: str, seconds: float) -> None:
        """The stage is published."""
        self._tell("end", fingerprint)
        super().finished(fingerprint, seconds)

    def warned(self, fingerprint: str, words: str) -> None:
        """The stage in hand raised an alert."""
        super().warned(fingerprint, words)
        self._tell("warning", fingerprint, words)

    def _tell(
        self,
        name: Literal["start", "step", "evaluate", "warning", "end"],
        fingerprint: str,
        words: str = "",
    ) -> None:
        stage = self.running.get(fingerprint)  # none of a task that ended before it told anything
        if stage is None:
            return
        numbers = {
            key: float(value)
            for key, value in stage.values.items()
            if isinstance(value, int | float) and key not in _NO_METRICS
        }
        kind = self.graph.nodes[fingerprint].kind
        event = Event(name, kind, fingerprint, stage.step, stage.total, numbers, words)
        for callback in self._callbacks:
            if callback(event) is True:
                self._stops = True
