"""What a person sees while a run goes: a live table in a terminal, plain lines elsewhere.

Everything goes to stderr; stdout belongs to results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater.terminal import CAUTION, GOOD, HEADING, QUIET, STUDENT, redraws, stderr_console
from headwater.visible import one_line
from headwater.workflow.graph import Graph

_LINE_SECONDS = 15.0
_BAR_WIDTH = 14
_MOST_ARMS_SHOWN = 3
_MAY_BE_CUT = ("arms", "numbers")  # columns of the live table
#: What is shown of a stage's numbers, in this order: name, heading, and how it reads.
_NUMBERS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("pass_rate", "pass rate", lambda share: f"{share:.0%}"),
    ("kl", "KL", lambda nats: f"{nats:.3f}"),
    ("reference_kl", "KL to reference", lambda nats: f"{nats:.3f}"),
    ("loss", "loss", lambda loss: f"{loss:.3f}"),
    ("response_tokens", "length", lambda tokens: f"{tokens:.0f}"),
    ("truncation_rate", "cut off", lambda share: f"{share:.0%}"),
    ("tokens_per_second", "tokens/s", lambda rate: f"{rate:,.0f}"),
)


@dataclass
class _Running:
    """A stage in hand: when it began, where it resumed, and its latest numbers."""

    began: float
    first_step: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    said: float = 0.0

    @property
    def step(self) -> int:
        return int(self.values.get("step", 0))

    @property
    def total(self) -> int | None:
        total = self.values.get("total")
        return None if total is None else int(total)

    def seconds_left(self, now: float) -> float | None:
        """From the pace since the first report, never below 0; None while nothing is known."""
        if self.first_step is None or self.total is None or self.step <= self.first_step:
            return None
        pace = (now - self.began) / (self.step - self.first_step)
        return max(0.0, pace * (self.total - self.step))


class ProgressView:
    """Keeps track of a run and shows nothing; a context that ends the display."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.running: dict[str, _Running] = {}
        self.done = 0
        self.total = len(graph.nodes)
        self.began = time.monotonic()

    @property
    def every_step(self) -> bool:
        """Whether workers are to tell every step, not only a few a second."""
        return False

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to save and stop."""
        return False

    def found(self, published: int) -> None:
        """So many stages are already published."""
        self.done = published

    def started(self, fingerprint: str) -> None:
        """A worker took the stage in hand."""
        self.running[fingerprint] = _Running(time.monotonic())

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """The stage in hand measured something: step, total, and numbers by name."""
        stage = self.running[fingerprint]
        stage.values.update(values)
        if stage.first_step is None:
            stage.first_step, stage.began = stage.step, time.monotonic()

    def finished(self, fingerprint: str, seconds: float) -> None:
        """The stage is published."""
        self.running.pop(fingerprint, None)
        self.done += 1

    def stopped(self, fingerprint: str, reason: str) -> None:
        """The stage ended before its end; why is told by whoever started the run."""
        self.running.pop(fingerprint, None)

    def warned(self, fingerprint: str, words: str) -> None:
        """The stage in hand raised an alert."""

    def say(self, message: str) -> None:
        """Something about the run as a whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def words(self, fingerprint: str) -> str:
        """A stage in few words: kind, pool, and the arms that use it."""
        node = self.graph.nodes[fingerprint]
        where = node.pool or node.eval_set
        what = f"{node.kind} {where}" if where else f"{node.kind} {node.model_name}"
        return f"{what} ({self.arms(fingerprint)})"

    def arms(self, fingerprint: str) -> str:
        """The arms that use a stage, a few by name."""
        arms = self.graph.users[fingerprint] or ("base model",)
        shown = ", ".join(arms[:_MOST_ARMS_SHOWN])
        more = len(arms) - _MOST_ARMS_SHOWN
        shown += f" and {more} more" if more > 0 else ""
        seed = self.graph.nodes[fingerprint].seed
        return f"{shown}; seed {seed}" if len(self.graph.seeds) > 1 else shown


class WrappedView(ProgressView):
    """Another view as it is, for what tells somebody else besides; what is told to this one is kept
    track of by that one."""

    def __init__(self, view: ProgressView) -> None:
        super().__init__(view.graph)
        self.running = view.running  # the same mapping: whoever reads it sees what `view` does
        self.view = view

    @property
    def every_step(self) -> bool:
        """As the other view wants it."""
        return self.view.every_step

    @property
    def stop_requested(self) -> bool:
        """As the other view says."""
        return self.view.stop_requested

    def found(self, published: int) -> None:
        """So many stages are already published."""
        self.view.found(published)

    def started(self, fingerprint: str) -> None:
        """A worker took the stage in hand."""
        self.view.started(fingerprint)

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """The stage in hand measured something."""
        self.view.progressed(fingerprint, values)

    def finished(self, fingerprint: str, seconds: float) -> None:
        """The stage is published."""
        self.view.finished(fingerprint, seconds)

    def stopped(self, fingerprint: str, reason: str) -> None:
        """The stage ended before its end."""
        self.view.stopped(fingerprint, reason)

    def warned(self, fingerprint: str, words: str) -> None:
        """The stage in hand raised an alert."""
        self.view.warned(fingerprint, words)

    def say(self, message: str) -> None:
        """Something about the run as a whole."""
        self.view.say(message)

    def __enter__(self) -> Self:
        self.view.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.view.__exit__(exc_type, exc, traceback)


class LineView(ProgressView):
    """One line for each event and, every so often, for each running stage."""

    def __init__(self, graph: Graph, console: Console) -> None:
        super().__init__(graph)
        self._console = console

    def started(self, fingerprint: str) -> None:
        """Remember the stage; its first line comes with its first number."""
        super().started(fingerprint)
        self.running[fingerprint].said = time.monotonic()

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """A line, unless there was one a moment ago."""
        super().progressed(fingerprint, values)
        stage, now = self.running[fingerprint], time.monotonic()
        if now - stage.said < _LINE_SECONDS:
            return
        stage.said = now
        left = stage.seconds_left(now)
        parts = [f"step {stage.step} of {stage.total}", *_numbers(stage.values)]
        parts += [f"{clock(left)} left"] if left is not None else []
        self._print(f"  {self.words(fingerprint)}: {', '.join(parts)}")

    def finished(self, fingerprint: str, seconds: float) -> None:
        """A line with the stage's time and last numbers."""
        stage = self.running.get(fingerprint)
        super().finished(fingerprint, seconds)
        self._print(_closing(self, fingerprint, stage, seconds))

    def stopped(self, fingerprint: str, reason: str) -> None:
        """A line with the reason."""
        super().stopped(fingerprint, reason)
        self._print(f"  {self.words(fingerprint)}: {reason}")

    def warned(self, fingerprint: str, words: str) -> None:
        """A line with the alert."""
        self._print(_warning(self, fingerprint, words))

    def say(self, message: str) -> None:
        """The message as it is."""
        self._print(message)

    def _print(self, line: str) -> None:
        self._console.print(Text(one_line(line)), soft_wrap=True)


class LiveView(ProgressView):
    """A table of the running stages that is drawn again four times a second."""

    def __init__(self, graph: Graph, console: Console) -> None:
        super().__init__(graph)
        self._live = Live(console=console, get_renderable=self._render, transient=True)

    def finished(self, fingerprint: str, seconds: float) -> None:
        """A lasting line above the table."""
        stage = self.running.get(fingerprint)
        super().finished(fingerprint, seconds)
        closing = one_line(_closing(self, fingerprint, stage, seconds))
        self._live.console.print(Text(closing, style=QUIET))

    def warned(self, fingerprint: str, words: str) -> None:
        """A lasting line above the table."""
        line = _warning(self, fingerprint, words)
        self._live.console.print(Text(line, style=CAUTION), soft_wrap=True)

    def say(self, message: str) -> None:
        """A lasting line above the table."""
        self._live.console.print(Text(one_line(message)))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        now = time.monotonic()
        table = Table(box=None, pad_edge=False, expand=False)
        for heading in ("stage", "arms", "", "step", "numbers", "left"):
            # What is long gives way, so that step and time left are never cut.
            table.add_column(heading, header_style=QUIET, no_wrap=heading not in _MAY_BE_CUT)
        # The executor changes the mapping while this thread draws: work on a copy.
        for fingerprint, stage in list(self.running.items()):
            node = self.graph.nodes[fingerprint]
            left = stage.seconds_left(now)
            known = stage.total is not None
            table.add_row(
                Text(f"{node.kind} {node.pool or node.eval_set or node.model_name}", style=HEADING),
                _cut(self.arms(fingerprint)),
                _bar(stage.total, stage.step),
                f"{stage.step}/{stage.total}" if known else "starting",
                _cut(", ".join(_numbers(stage.values))),
                "" if left is None else clock(left),
            )
        overall = Table.grid(padding=(0, 1))
        overall.add_row(
            _bar(self.total, self.done),
            f"{self.done} of {self.total} stages, {clock(now - self.began)}",
        )
        return Group(table, overall)


def make_view(graph: Graph, *, quiet: bool = False) -> ProgressView:
    """The display that fits: nothing when quiet, a live table in a terminal, else lines."""
    if quiet:
        return ProgressView(graph)
    console = stderr_console()
    return LiveView(graph, console) if redraws(console) else LineView(graph, console)


def _cut(text: str) -> Text:
    """One line, with an ellipsis where it is too long."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _bar(total: float | None, completed: float) -> ProgressBar:
    return ProgressBar(
        total=total,
        completed=completed,
        width=_BAR_WIDTH,
        style=QUIET,
        complete_style=STUDENT,
        finished_style=GOOD,
        pulse_style=STUDENT,
    )


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss.

    >>> clock(75), clock(3725)
    ('1:15', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _numbers(values: Mapping[str, Any]) -> list[str]:
    """The numbers worth a look; a loss only where there is no pass rate or KL."""
    found = [
        (name, f"{heading} {show(float(values[name]))}")
        for name, heading, show in _NUMBERS
        if values.get(name) is not None
    ]
    names = {name for name, _ in found}
    told = bool(names & {"pass_rate", "kl"})
    return [text for name, text in found if not (name == "loss" and told)]


def _warning(view: ProgressView, fingerprint: str, words: str) -> str:
    return f"  warning: {one_line(f'{view.words(fingerprint)}: {words}')}"


def _closing(view: ProgressView, fingerprint: str, stage: _Running | None, seconds: float) -> str:
    """[done/total] what: its time and last numbers."""
    numbers = _numbers(stage.values) if stage is not None else []
    ending = "".join(f", {number}" for number in numbers)
    return f"[{view.done}/{view.total}] {view.words(fingerprint)}: {clock(seconds)}{ending}"
