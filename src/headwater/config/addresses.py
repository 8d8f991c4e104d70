"""Servers by address, and the environment variables that hold their keys."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from headwater.redaction import is_secret_name


def _http_address(url: str) -> str:
    """An address without a secret in it. Raises ValueError for any other."""
    try:
        parts = urlsplit(url)
        secret = bool(parts.username or parts.password or parts.query)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        secret, plain = False, False
    if secret:
        raise ValueError(
            "a server's address with a user, password or query in it, which would be written into "
            "the run; expected http://HOST:PORT, with the key in an environment variable that "
            "key_variable names, such as VLLM_API_KEY"
        )
    if not plain:
        raise ValueError(
            f"{url!r} is not a server's address; expected http://HOST:PORT or https://HOST:PORT"
        )
    return url.rstrip("/")


def _secret_name(name: str) -> str:
    """A variable's name that messages know to hide the value of. Raises ValueError for another."""
    if not is_secret_name(name):
        raise ValueError(
            f"key_variable={name!r} does not sound secret, so that its value would not be kept "
            "out of messages; expected a name like TEACHER_API_KEY"
        )
    return name


def is_here(url: str) -> bool:
    """Whether an address is one by which a machine reaches itself."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


Url = Annotated[str, AfterValidator(_http_address)]
KeyVariable = Annotated[str, AfterValidator(_secret_name)]
