"""Uploading a folder to the Hugging Face hub; the one module that imports huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from headwater.errors import InputError, StageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def require_pushable(repository: str) -> None:
    """Raise InputError unless `repository` is ORG/NAME, the hub may be asked, and a token is set.

    Nothing is asked of the network.
    """
    from huggingface_hub import constants, get_token

    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"--push {repository}: expected ORG/NAME, as in my-name/my-model")
    if constants.is_offline_mode():
        raise InputError(
            f"--push {repository} while HF_HUB_OFFLINE is set: expected a hub that may be reached; "
            "unset it, or leave --push out and upload the folder later"
        )
    if get_token() is None:
        raise InputError(
            f"--push {repository} without a token: expected one that may write to "
            f"{repository.partition('/')[0]}; run `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, repository: str) -> str:
    """Upload the folder as a model repository, private where it is new; returns its address.

    Raises StageError where the hub cannot be reached or refuses; the folder is left as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload model exported by headwater",
        )
    except (HTTPError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise StageError(
            f"{folder} is written, but not uploaded to {repository} ({said}): expected a hub that "
            f"answers and a token that may write there; mend that and run `hf upload {repository} "
            f"{folder}`"
        ) from error
    return str(address)
