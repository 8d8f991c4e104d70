"""Secrets kept out of everything that is written or shown: messages, logs, run folders, reports.

A library that fails at the hub may put the request's address or header into its message. Every
error headwater raises passes its text through `redact`.
"""

from __future__ import annotations

import os
import re

REDACTED = "[redacted]"

#: Environment variables that hold something secret, by a part of their names.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(?:API|ACCESS|PRIVATE|SIGNING)_?KEY)"
    r"(?:_|$)|APIKEY",
    re.IGNORECASE,
)
_SHORTEST = 8  # a shorter value is as likely to be a word
_PATTERNS = (
    re.compile(r"(?<=://)[^/\s@\"']+(?=@)"),  # user:password of an address
    re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|xox[abp])[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bgithub_pat_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b"),
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"(?i)(?<=[?&])((?:access_|auth_)?token|api_?key|signature|x-amz-signature|sig|password)"
        r"=[^&\s\"']+"
    ),
)


def redact(text: str) -> str:
    """The text without access tokens: those of the environment, and whatever looks like one.

    >>> redact("GET https://me:pass-word@host/x?token=abc123def")
    'GET https://[redacted]@host/x?token=[redacted]'
    """
    for secret in _secrets_of_environment():
        text = text.replace(secret, REDACTED)
    for pattern in _PATTERNS:
        text = pattern.sub(_replacement, text)
    return text


def without_secrets(environment: dict[str, str]) -> dict[str, str]:
    """A copy of an environment without the variables whose names say that they are secret.

    >>> without_secrets({"HF_TOKEN": "hf_x", "OPENAI_API_KEY": "y", "HOME": "/home/me"})
    {'HOME': '/home/me'}
    """
    return {name: value for name, value in environment.items() if not is_secret_name(name)}


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    if name.upper().endswith(("_PATH", "_FILE", "_DIR")):  # says where one is kept
        return False
    return _SECRET_NAME.search(name) is not None


def _secrets_of_environment() -> list[str]:
    """Longest first, so that one that is part of another leaves nothing of it."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value.strip()) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)


def _replacement(found: re.Match[str]) -> str:
    key = found.group(1) if found.lastindex else None
    return REDACTED if key is None else f"{key}={REDACTED}"
