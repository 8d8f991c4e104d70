"""The verbs of a finished model: export, chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.chat import Chat
    from headwater.publishing.export import Export
    from headwater.workflow.graph import Role


def export(
    model: str | Path,
    to: str | Path,
    *,
    arm: str | None = None,
    seed: int | None = None,
    role: Role | None = None,
    format: str = "hf",
    dtype: str | None = None,
    push: str | None = None,
    force: bool = False,
) -> Export:
    """Write a model to the folder `to`: weights, tokenizer, chat template, and a model card.

    model: a run's folder, with `arm` and, unless they are the first seed and the model the arm is
    evaluated by, `seed` and `role` ("teacher" or "student"); a model folder; or a source such as
    hf:ID. format: "hf" (transformers, vLLM) or "gguf" (llama.cpp). dtype: "float32", "bfloat16",
    "float16" and, for gguf, "q8_0"; by default the weights' own. push: ORG/NAME on the hub to
    upload to as well. force: replace what `to` holds. Raises InputError before anything is
    written, StageError for a damaged model or an upload that failed.
    """
    from headwater.publishing.export import ExportSettings, export_model

    settings = ExportSettings(Path(to), format, dtype, push, force)
    return export_model(str(model), settings, arm=arm, seed=seed, role=role)


def chat(
    model: str | Path,
    *,
    arm: str | None = None,
    system: str | None = None,
    prompt: str = "bare",
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> Chat:
    """A conversation with a model: `with chat(MODEL) as one: print(one.say("...").text)`.

    model, arm: as `export` takes them. system: a message before all others. prompt: the form that
    problems are put in ("boxed", "hash", "answer_is" or "bare"). sampling: temperature, top_p,
    top_k and max_new_tokens. seed: of the samples, and the weights of untrained tiny models.
    Raises InputError for settings or a model that cannot work.
    """
    from pydantic import ValidationError

    from headwater.chat import Chat, ChatSettings
    from headwater.config.compute import Compute
    from headwater.config.evaluation import EvaluationSampling

    try:
        drawn = EvaluationSampling.model_validate(sampling or {})
        compute = Compute.model_validate({"device": device, "precision": precision})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where} = {first['input']!r}: {message}; correct it") from None
    return Chat(str(model), ChatSettings(system, prompt, drawn, compute, seed), arm=arm)
