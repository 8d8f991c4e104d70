"""Ctrl-C, counted instead of died of."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any, Self


class Interrupts:
    """A context in which SIGINT and SIGTERM are counted; of a main thread only, elsewhere none."""

    def __init__(self) -> None:
        self.count = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """From here on signals are counted."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _count(self, *_: object) -> None:
        self.count += 1
