"""What a model folder's config.json says; torch-free, so that planning can ask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.plain_json import read_json_file


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json in the folder `folder`.

    Raises InputError where it is missing or is not one JSON object.
    """
    path = folder / "config.json"
    try:
        values = read_json_file(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected a Hugging Face folder; give the "
            "folder that holds config.json"
        ) from error
    except ValueError as error:  # covers bytes that are not UTF-8
        raise InputError(
            f"{path} is not JSON ({error}): expected the config that transformers writes; copy it "
            "from the model again"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds one {type(values).__name__}: expected a JSON object, as transformers "
            "writes; copy it from the model again"
        )
    return values


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config about the text decoder: all of it, but for models of several parts."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
