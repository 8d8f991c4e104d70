"""Which trackers a run reports to; they change no number a stage computes."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACKERS: tuple[Tracker, ...] = ("tensorboard", "wandb", "trackio", "mlflow")


def _known(value: Any) -> Any:
    """Names as a tuple; one may stand alone, and "none" says that there are none."""
    if value is None or value == "none":
        return ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        return value
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(str(name).lower(), TRACKERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name one of these, or none"
            raise ValueError(
                f"{name!r} is no tracker; expected any of {', '.join(TRACKERS)}; {hint}"
            )
    return tuple(dict.fromkeys(names))


#: Trackers by name; none is the default, and nothing is sent anywhere.
ReportTo = Annotated[tuple[Tracker, ...], BeforeValidator(_known)]
