"""What stands behind a name in a recipe: the code of a verifier, the files of a local model.

A fingerprint that held the name alone would take an artifact of the old file for one of the new.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from headwater.config.recipe import Recipe
from headwater.config.stages import outside_teacher
from headwater.config.teachers import CachedTeacher
from headwater.errors import InputError
from headwater.models.source_names import SourceKind, describe_source
from headwater.storage import sha256_of
from headwater.tasks.procedural import library_version

_GGUF_PART = 2**20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SETTINGS = (".json", ".jinja", ".txt", ".model")  # tokenizers too


def verifier_code(spec: str) -> str | None:
    """Hash of the file that a verifier's function is in, or the version of its library.

    What that file imports is not covered. The module is found, not imported. None for verifiers
    that are ours, which the stage's version covers.
    """
    kind, _, target = spec.partition(":")
    if kind == "reasoning_gym":
        return library_version()
    if kind not in ("python", "reward"):
        return None
    module = target.rpartition(":")[0]
    file = Path(module) if module.endswith(".py") else _module_file(module)
    if file is None or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def runs_own_code(spec: str) -> bool:
    """Whether a verifier is a function that the recipe names, in a file or a module."""
    return spec.startswith(("python:", "reward:"))


def own_code_warnings(spec: str) -> tuple[str, ...]:
    """What to say of a verifier that is code of the recipe's, before it is run."""
    if not runs_own_code(spec):
        return ()
    return (
        f"this recipe runs code: its verifier {spec} is called on this machine with your rights, "
        "not sealed as the built-in verifiers are; read that code before you run a recipe that "
        "you were given",
    )


def source_files(source: str) -> str | None:
    """Hash of what a source on this disk is; None for one that its name alone decides.

    Of a folder: the contents of its settings and tokenizer, and names, sizes and times of its
    weights. Of a GGUF file: its size and its first and last MiB.
    """
    described = describe_source(source)
    path = Path(described.target).expanduser()
    if described.kind is SourceKind.GGUF and path.is_file():
        return _gguf(path)
    if described.kind is SourceKind.HF and path.is_dir():
        return _folder(path)
    return None


def rollout_files(recipe: Recipe) -> dict[str, str]:
    """Hash of the content of every cache of teacher rollouts that a recipe reads, by its name.

    Raises InputError for one that is not there, and for two of one name.
    """
    found: dict[str, str] = {}
    places: dict[str, Path] = {}
    for arm in recipe.arms.values():
        for item in arm.student or ():
            teacher = outside_teacher(recipe.stage(item))
            if not isinstance(teacher, CachedTeacher):
                continue
            path = Path(teacher.path).expanduser()
            if places.setdefault(teacher.name, path) != path:
                raise InputError(
                    f"rollouts {path} and {places[teacher.name]} are both called {teacher.name}; "
                    "expected names of their own; rename one of the two"
                )
            found[teacher.name] = _rollout_content(path)
    return found


def _rollout_content(path: Path) -> str:
    """Hash of a .parquet file, or of the manifest that has the hashes of an artifact's files."""
    file = path / "manifest.json" if path.is_dir() else path
    if not file.is_file() or (file == path and path.suffix != ".parquet"):
        raise InputError(
            f"rollouts cache:{path}: found no teacher rollouts there; expected a .parquet file, or "
            "RUN/artifacts/FINGERPRINT of a stage teacher_rollouts; correct the path"
        )
    return sha256_of(file)


def _module_file(module: str) -> Path | None:
    name, file = "", None
    places: Sequence[str] | None = [*sys.path, str(Path.cwd())]  # as a verifier's worker looks
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        found = PathFinder.find_spec(name, places)
        if found is None:
            return None
        places, file = found.submodule_search_locations, found.origin
    path = None if file is None else Path(file)
    return path if path is not None and path.is_file() else None


def _folder(path: Path) -> str:
    entries: list[list[str | int]] = []
    for file in sorted(path.iterdir()):
        if file.suffix in _WEIGHTS:
            entries.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
        elif file.suffix in _SETTINGS:
            entries.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _gguf(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(_GGUF_PART))
        file.seek(max(0, size - _GGUF_PART))
        digest.update(file.read(_GGUF_PART))
    return digest.hexdigest()
