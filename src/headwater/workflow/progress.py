"""What a person sees while a run goes: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from headwater.workflow.graph import Graph


class ProgressView(Protocol):
    """Told by the executor what happens; a context that ends the display."""

    def started(self, fingerprint: str) -> None:
        """A worker took the stage in hand."""
        ...

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """The stage in hand measured something."""
        ...

    def finished(self, fingerprint: str, seconds: float) -> None:
        """The stage is published."""
        ...

    def stopped(self, fingerprint: str, reason: str) -> None:
        """The stage ended before its end."""
        ...

    def say(self, message: str) -> None:
        """Something about the run as a whole."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class SilentView:
    """Shows nothing."""

    def started(self, fingerprint: str) -> None:
        """Nothing."""

    def progressed(self, fingerprint: str, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def finished(self, fingerprint: str, seconds: float) -> None:
        """Nothing."""

    def stopped(self, fingerprint: str, reason: str) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


def make_view(graph: Graph, *, quiet: bool = False) -> ProgressView:
    """The display that fits: none when quiet."""
    return SilentView()
