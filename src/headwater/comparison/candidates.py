"""The models that are evaluated: what they are called, what files they are, where they lie."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.models.source_names import SourceKind, describe_source, require_available
from headwater.plain_json import read_json_file
from headwater.storage import write_whole
from headwater.tasks.named_sources import split_name
from headwater.tasks.readings import Reading
from headwater.workflow.identities import source_files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_RECORD = "model.json"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The files of a model: the sha256 over the hashes of all, and that of each weights' file."""

    sha256: str
    weights: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be evaluated.

    name: as tables call it. source: a folder, or the name of a source. key: what it is, as far as
    is known before it is fetched: the hash of a folder's files, else of the source's name and
    what that stands for on this disk. seed: draws the weights of tiny models. facts: of a folder.
    """

    name: str
    source: str
    key: str
    seed: int
    facts: ModelFacts | None = None

    @property
    def folder_name(self) -> str:
        """A folder of its own: by name, and by what it is."""
        return f"{slug(self.name)}-{self.key[:8]}"


def candidates(models: Sequence[str], seed: int) -> list[Candidate]:
    """The models behind `MODEL` and `NAME=MODEL`, each there or to be had.

    Raises InputError for one that is given twice or does not exist, and for two of one name.
    """
    named: dict[str, str] = {}
    for model in models:
        name, source = (None, model) if Path(model).is_dir() else split_name(model)
        name = name or source
        if source in named.values():
            raise InputError(f"{source}: given twice; name each model once")
        if name in named:
            raise InputError(f"{name}: two models of one name; name them apart: NAME=MODEL")
        named[name] = source
    return [_candidate(name, source, seed) for name, source in named.items()]


def slug(name: str) -> str:
    """A name as part of a folder's: the end of a path, without odd characters.

    >>> slug("runs/q/artifacts/0f3a/model"), slug("hf:Qwen/Qwen3-0.6B")
    ('0f3a', 'Qwen3-0.6B')
    """
    parts = [part for part in re.split(r"[/\\:]", name) if part not in ("", ".", "..")]
    last = parts[-1] if parts else name
    if last == "model" and len(parts) > 1:
        last = parts[-2]
    return re.sub(r"[^\w.+-]+", "_", last)[:48].strip("._") or "model"


def _candidate(name: str, source: str, seed: int) -> Candidate:
    """Raises InputError for a model that is not to be had."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{source} has no config.json; give a Hugging Face folder, such as "
                "RUN/artifacts/FINGERPRINT/model"
            )
        facts = read_facts(path)
        return Candidate(name, source, facts.sha256, seed, facts)
    try:
        described = describe_source(source)
    except InputError as error:
        raise InputError(f"{source}: no such folder, and {error}") from None
    if described.kind is SourceKind.PRUNE:
        raise InputError(
            f"{source}: only a recipe knows the parent; give the pruned model's folder"
        )
    require_available(source)
    drawn = seed if described.kind is SourceKind.TINY else None
    return Candidate(name, source, digest([source, source_files(source), drawn]), seed)


def read_facts(folder: Path) -> ModelFacts:
    """Hashes of a model folder's files; what training left beside them is no part of it."""
    hashes = {
        file.name: _sha256(file)
        for file in sorted(folder.iterdir())
        if file.suffix in (*_WEIGHTS, ".json", ".jinja", ".txt", ".model") and file.is_file()
    }
    weights = {name: one for name, one in hashes.items() if name.endswith(_WEIGHTS)}
    return ModelFacts(digest(hashes), weights)


def fetch(candidate: Candidate, folder: Path) -> tuple[Path, ModelFacts]:
    """The model's folder and its hashes; a source is fetched into `folder`. Loads torch.

    Raises InputError where a source has become another model since `folder` was begun.
    """
    if candidate.facts is not None:
        path, facts = Path(candidate.source), candidate.facts
    else:
        path = folder / "weights"
        if not path.is_dir():
            _materialise(candidate, path)
        facts = read_facts(path)
    known = known_facts(folder)
    if known is not None and known != facts:
        raise InputError(
            f"{candidate.source} is another model now (sha256 {facts.sha256[:12]}) than the one "
            f"{folder} was begun with ({known.sha256[:12]}); give --out another folder"
        )
    record = {"source": candidate.source, "sha256": facts.sha256, "weights": dict(facts.weights)}
    write_json(record, folder / _RECORD)
    return path, facts


def known_facts(folder: Path) -> ModelFacts | None:
    """What `fetch` found when `folder` was begun; None where it was not."""
    if not (folder / _RECORD).is_file():
        return None
    record = read_json(folder / _RECORD)
    return ModelFacts(record["sha256"], record["weights"])


def forget_weights(folder: Path) -> None:
    """Remove what `fetch` put into `folder`, but for its hashes."""
    shutil.rmtree(folder / "weights", ignore_errors=True)


def check_reads(candidate: Candidate, path: Path, prompt: str, readings: Sequence[Reading]) -> None:
    """Raise InputError unless the model has a token and a position for all it will read."""
    from headwater.models.context_length import check_context

    check_context(path, candidate.name, prompt, readings)


def write_json(record: Any, path: Path) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises InputError for a damaged file."""
    try:
        return read_json_file(path)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); remove it and run again") from error


def _materialise(candidate: Candidate, path: Path) -> None:
    from headwater.models.sources import materialise

    writing = path.with_name("weights.part")
    shutil.rmtree(writing, ignore_errors=True)
    materialise(candidate.source, writing, seed=candidate.seed)
    writing.rename(path)


def digest(value: Any) -> str:
    """SHA-256 of a plain value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
