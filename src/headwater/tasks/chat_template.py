"""A message as the chat a model's template makes of it, rendered within limits.

Templates come with models. transformers renders them in jinja2's immutable sandbox, which reaches
neither modules nor private attributes; time is limited here.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from headwater.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT_SECONDS = 10.0
"""Of one message. A template takes well under a millisecond."""

#: Whatever a template can make Python raise; jinja2's own errors beside them.
_PYTHON_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _TooLong(Exception):
    """The template's time is up."""


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> str:
    """Messages of {role, content} as a chat, up to where the assistant's next answer begins.

    Raises InputError for a template that fails, reaches for what the sandbox forbids, or takes
    longer than `LIMIT_SECONDS` (in a process's main thread, where its time can be limited).
    """
    try:
        with _limited(LIMIT_SECONDS):
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=False,
                    enable_thinking=False,
                )
            )
    except _TooLong:
        reason = f"did not end within {LIMIT_SECONDS:g} s"
    except _template_errors() as error:
        reason = f"failed: {type(error).__name__}: {error}"
    raise InputError(
        f"the chat template of {tokenizer.name_or_path!r} {reason}: expected one that writes a "
        "user's message; mend chat_template.jinja, or get the model from where you trust it"
    )


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2  # asked for only once something failed

    return (jinja2.TemplateError, *_PYTHON_ERRORS)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong inside the block once it has taken so long; a no-op off the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _time_is_up)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, before)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise _TooLong
