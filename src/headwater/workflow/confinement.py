"""A run folder is its own place: nothing in it leads out, or is anything but files and folders.

A folder received from somebody may hold links: what is read through one is another file of this
machine, and what is written through one overwrites it. headwater itself makes none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from headwater.errors import InputError

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", re.ASCII)


#: What the names of everything in a run folder begin with.
_OF_A_RUN = (
    *("artifacts", "staging", "checkpoints", "logs", "tables", "figures"),
    *("run.", "workers.", "recipe.yaml", "results.json", "report.html", "ledger.sqlite"),
)


def require_own_files(folder: Path, names: tuple[str, ...] = _OF_A_RUN) -> None:
    """Raise InputError where something of a run's is a link, or neither file nor folder.

    names: how the names of what is looked at in `folder` itself begin, by default those of a run
    and with ("",) everything; below, everything is looked at. `folder` may be a link: whoever
    calls has named it. One that does not exist is sound.
    """
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            entries = list(os.scandir(place))
        except FileNotFoundError:
            continue
        for entry in entries:
            if place == folder and not entry.name.startswith(names):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                kind = "a link" if entry.is_symlink() else "no regular file"
                raise InputError(
                    f"{entry.path} is {kind}: a run's folder holds its own files and folders "
                    "alone, so that nothing outside is read or overwritten; remove it, or copy "
                    "the folder with its links followed (cp -rL) if you trust where they lead"
                )


def is_folder_name(name: object) -> bool:
    """Whether this may be a folder's name, as fingerprints are: it leads nowhere else."""
    return isinstance(name, str) and _FOLDER_NAME.fullmatch(name) is not None


def is_inside(name: object) -> bool:
    """Whether this is a file's path relative to its folder, and stays below it.

    >>> is_inside("model/config.json"), is_inside("../x"), is_inside("/etc/passwd"), is_inside("")
    (True, False, False, False)
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()
