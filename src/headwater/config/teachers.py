"""Teacher rollouts from outside a study: a model behind a server, or rollouts that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from headwater.config.addresses import KeyVariable, Url
from headwater.config.base import Settings


class OpenAITeacher(Settings):
    """A model behind a server that speaks OpenAI's API; `model` is its name there.

    api: `chat` asks the question as a user's message, which the server puts into its model's own
    template; `completions` sends the student's token ids, for a model with the same tokenizer.
    key_variable: the environment variable with the server's key; none is sent where it is not set.
    requests_in_flight: asked at once. request_seconds: how long an answer may take.
    """

    kind: Literal["openai"] = "openai"
    model: Annotated[str, Field(min_length=1, max_length=200)]
    base_url: Url
    api: Literal["chat", "completions"] = "chat"
    key_variable: KeyVariable = "OPENAI_API_KEY"
    requests_in_flight: Annotated[int, Field(ge=1, le=1024)] = 8
    request_seconds: PositiveFloat = 600.0

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"openai:{self.model}"


class CachedTeacher(Settings):
    """Teacher rollouts on this disk: another run's artifact, or a .parquet file."""

    kind: Literal["cache"] = "cache"
    path: Annotated[str, Field(min_length=1)]

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"cache:{self.path.rstrip('/').rpartition('/')[2]}"


_FORMS = (
    "found {found!r}; expected rollouts from a place; write cache:PATH, or "
    "{{source: openai:MODEL, base_url: http://HOST:PORT/v1}}"
)


def _written_short(value: Any) -> Any:
    """`cache:PATH`, and `openai:MODEL` in the place of the model's name."""
    if isinstance(value, str):
        kind, _, target = value.partition(":")
        if kind not in ("cache", "openai") or not target:
            raise ValueError(_FORMS.format(found=value))
        return {"kind": kind, "path" if kind == "cache" else "model": target}
    if isinstance(value, Mapping) and "source" in value:
        rest = {key: item for key, item in value.items() if key != "source"}
        return {**_written_short(value["source"]), **rest}
    if not isinstance(value, Mapping | Settings):
        raise ValueError(_FORMS.format(found=value))
    return value


OutsideTeacher = Annotated[
    OpenAITeacher | CachedTeacher, Field(discriminator="kind"), BeforeValidator(_written_short)
]
