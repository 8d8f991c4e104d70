"""Errors a user can meet, one class per exit code.

Every message has three parts: the value found, what was expected, and the cure.
"""

from __future__ import annotations

from headwater.redaction import redact


class HeadwaterError(Exception):
    """Root of every error headwater raises on purpose; `exit_code` is the process's.

    Its message is `redact`ed: what a library said of a failed request may hold a token.
    """

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(one) if isinstance(one, str) else one for one in arguments))


class InputError(HeadwaterError):
    """Bad input (recipe, data, model, option), found before anything is trained."""

    exit_code = 2


class SourceUnavailable(InputError):
    """A data source that is elsewhere and cannot be reached from here; planning goes on without."""


class StageError(HeadwaterError):
    """A stage could not finish; everything published before it is kept."""

    exit_code = 1


class RankLost(StageError):
    """A process that shared a stage with this one is gone; the stage itself did nothing wrong."""


class BudgetExhausted(HeadwaterError):
    """A budget of the recipe is used up; everything so far is saved."""

    exit_code = 3


class Interrupted(HeadwaterError):
    """The user stopped the run; running the same command continues it."""

    exit_code = 130
