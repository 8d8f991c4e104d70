"""Datasets of the Hugging Face hub; the one module that imports `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwater.errors import InputError, SourceUnavailable

_DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}


def hub_parts(source: str) -> tuple[str, str | None, str]:
    """(dataset id, config, split) of `hf:ID`, `hf:ID:SPLIT` or `hf:ID:CONFIG:SPLIT`.

    The split is `train` and the config the dataset's only one (GSM8K's: `main`) unless named.
    Raises InputError for any other form.

    >>> hub_parts("hf:openai/gsm8k:test")
    ('openai/gsm8k', 'main', 'test')
    """
    dataset, *rest = source.removeprefix("hf:").split(":")
    if not dataset or len(rest) > 2 or not all(rest):
        raise InputError(
            f"{source} is not a dataset; write hf:ID, hf:ID:SPLIT or hf:ID:CONFIG:SPLIT"
        )
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else _DEFAULT_CONFIGS.get(dataset)
    return dataset, config, split


def hub_name(source: str) -> str:
    """Short name: the id's last part and the split.

    >>> hub_name("hf:openai/gsm8k")
    'gsm8k-train'
    """
    dataset, _, split = hub_parts(source)
    return f"{dataset.rstrip('/').rpartition('/')[2]}-{split}"


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset (or of a local dataset folder), as dicts.

    Raises SourceUnavailable when `datasets` is not installed or the hub cannot be reached, and
    InputError for a source that cannot be loaded.
    """
    dataset, config, split = hub_parts(source)
    try:
        import datasets
    except ImportError as error:
        raise SourceUnavailable(
            f"{source} needs the package datasets; pip install 'headwater[hub]', or give a file"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except ConnectionError as error:  # what datasets makes of every failure to reach the hub
        raise SourceUnavailable(
            f"{source}: {error}; check that the hub can be reached, or give a file"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: {error}; check the id, config and split") from error
    yield from rows
