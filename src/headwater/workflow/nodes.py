"""Whether a machine of a cluster can run a study's stages: it sees the run folder and our code.

Free of any cluster: `look` runs on the machine in question, `require_alike` where the run is.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headwater import __version__
from headwater.errors import InputError
from headwater.workflow.identities import verifier_code

TOKEN_FILE = "run.token"  # noqa: S105 - a file's name
_COMPUTES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Sight:
    """What one machine sees. token: the run folder's, None where there is none; verifier: hash
    of the file a recipe's own verifier is in; versions: of what decides numbers."""

    host: str
    token: str | None
    verifier: str | None
    versions: dict[str, str]


def leave_token(run_dir: Path) -> str:
    """Write a token that no other folder has; returns it."""
    token = secrets.token_hex(16)
    (run_dir / TOKEN_FILE).write_text(token, encoding="utf-8")
    return token


def look(run_dir: Path, folder: Path, verifier: str) -> Sight:
    """What this machine sees of a run folder, and of a verifier named relative to `folder`."""
    enter(folder)
    return Sight(platform.node(), _token(run_dir), verifier_code(verifier), _versions())


def enter(folder: Path) -> None:
    """Work in the folder the run was started in, where this machine has it: files that a recipe
    names are found relative to it."""
    if folder.is_dir():
        os.chdir(folder)


def require_alike(seen: Sight, here: Sight, run_dir: Path, node: str) -> None:
    """Raise InputError naming the node where it sees another run folder or other code than here."""
    where = f"node {node} ({seen.host})"
    _require_same(seen.token, here.token, run_dir, where)
    if seen.versions != here.versions:
        differ = [
            f"{name} {seen.versions.get(name)} (here {ours})"
            for name, ours in here.versions.items()
            if seen.versions.get(name) != ours
        ]
        raise InputError(
            f"{where} has {', '.join(differ)}; expected the same versions on every node: install "
            "them there as they are here"
        )
    if seen.verifier != here.verifier:
        raise InputError(
            f"{where} has no verifier file as it is here; expected the same file at the same "
            "place: put it on shared storage, start the run in its folder, or install it there"
        )


def require_token(run_dir: Path, token: str) -> None:
    """Raise InputError naming this machine where it does not have the run folder with `token`."""
    _require_same(_token(run_dir), token, run_dir, f"node {platform.node()}")


def import_path() -> str:
    """Where this process finds code besides its installation, for PYTHONPATH elsewhere."""
    installed = {Path(place).resolve() for place in sysconfig.get_paths().values()}
    installed |= {Path(sysconfig.get_paths()["stdlib"]).resolve() / "lib-dynload"}
    places = [Path(place or Path.cwd()).resolve() for place in sys.path]
    return os.pathsep.join(dict.fromkeys(str(p) for p in places if p not in installed))


def _token(run_dir: Path) -> str | None:
    try:
        return (run_dir / TOKEN_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def _require_same(seen: str | None, expected: str | None, run_dir: Path, where: str) -> None:
    if seen != expected:
        found = "has no such folder" if seen is None else "has another folder there"
        raise InputError(
            f"{run_dir}: {where} {found}; expected the run folder at the same path on every node: "
            "mount storage that all nodes share and give --out a folder on it, or take the node "
            "out of the cluster"
        )


def _versions() -> dict[str, str]:
    found = {"headwater": __version__, "python": platform.python_version()}
    for package in _COMPUTES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
