"""`headwater export`: a model as a folder that others load, with a card that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from headwater.config.loading import load_recipe
from headwater.errors import InputError
from headwater.models.config_file import read_config
from headwater.publishing.chosen import ChosenModel, TrainedModel, choose_model, model_folder
from headwater.publishing.hub import push, require_pushable
from headwater.report.model_card import CARD_FILE, CardSubject, render_card
from headwater.report.results import RESULTS_FILE, read_results
from headwater.storage import UNFINISHED, disk_errors, flush_tree
from headwater.workflow.graph import Role

Format = Literal["hf", "gguf", "adapter"]
RECIPE_FILE = "recipe.yaml"

_DTYPES: Mapping[str, tuple[str, ...]] = {
    "hf": ("float32", "bfloat16", "float16"),
    "gguf": ("float32", "bfloat16", "float16", "q8_0"),
    "adapter": ("float32",),
}
#: Where the artifact of a stage with LoRA has its adapter, beside `model/`.
_ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Export:
    """What was exported and where it lies.

    arm, seed, role, stage: of a run's model, None for any other. dtype: of the weights. card: the
    path of its README.md, None for a model that no run knows and that came without one. address:
    of the repository it was uploaded to, None where it was not.
    """

    name: str
    source: str
    folder: Path
    format: str
    dtype: str
    files: tuple[str, ...]
    bytes: int
    card: Path | None
    arm: str | None = None
    seed: int | None = None
    role: str | None = None
    stage: str | None = None
    address: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        card = None if self.card is None else str(self.card)
        return asdict(self) | {"folder": str(self.folder), "card": card}


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How a model is exported. dtype: None keeps the format of its weights.

    repository: ORG/NAME on the hub to upload to. force: replace what `to` holds.
    """

    to: Path
    format: str = "hf"
    dtype: str | None = None
    repository: str | None = None
    force: bool = False


def export_model(
    model: str,
    settings: ExportSettings,
    *,
    arm: str | None = None,
    seed: int | None = None,
    role: Role | None = None,
) -> Export:
    """Write a model to a folder of its own, whole or not at all. Loads torch.

    model, arm, seed, role: as `choose_model` takes them. Raises InputError before anything is
    written for a model, a format or a folder that will not do, and for an upload that cannot
    succeed; StageError for a damaged artifact, a full disk, or an upload that failed.
    """
    _check(settings)
    chosen = choose_model(model, arm=arm, seed=seed, role=role)
    if settings.format == "adapter" and not _adapter_of(chosen).is_dir():
        raise InputError(
            f"--format adapter: {chosen.name} was not trained through adapters; expected an arm "
            "whose last stage has lora: use --format hf"
        )
    writing = settings.to.with_name(f"{settings.to.name}{UNFINISHED}")
    with disk_errors(settings.to), model_folder(chosen) as source:
        if source.resolve().is_relative_to(settings.to.resolve()):
            raise InputError(
                f"--to {settings.to} is the model itself, or holds it: expected a folder apart "
                "from it; give another"
            )
        dtype = _dtype(settings, source)
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            if settings.format == "adapter":
                shutil.copytree(_adapter_of(chosen), writing, dirs_exist_ok=True)
                file = None
            else:
                file = _write(source, writing, settings, dtype, chosen.name)
            _write_card(chosen, source, writing, settings, dtype, file)
            flush_tree(writing)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        if settings.to.exists():
            shutil.rmtree(settings.to)
        writing.rename(settings.to)
    files = sorted(path for path in settings.to.rglob("*") if path.is_file())
    card = settings.to / CARD_FILE
    address = None if settings.repository is None else push(settings.to, settings.repository)
    trained = chosen.trained
    return Export(
        name=chosen.name,
        source=chosen.source,
        folder=settings.to,
        format=settings.format,
        dtype=dtype,
        files=tuple(path.relative_to(settings.to).as_posix() for path in files),
        bytes=sum(path.stat().st_size for path in files),
        card=card if card.is_file() else None,
        arm=None if trained is None else trained.plan.arm,
        seed=None if trained is None else trained.plan.seed,
        role=None if trained is None else trained.role,
        stage=None if trained is None else trained.fingerprint,
        address=address,
    )


def _check(settings: ExportSettings) -> None:
    """Raise InputError for settings that cannot work, whatever the model is."""
    if settings.format not in get_args(Format):
        raise InputError(
            f"--format {settings.format}: expected one of {', '.join(get_args(Format))}"
        )
    allowed = _DTYPES[settings.format]
    if settings.dtype is not None and settings.dtype not in allowed:
        raise InputError(
            f"--dtype {settings.dtype} with --format {settings.format}: expected one of "
            f"{', '.join(allowed)}"
        )
    to = settings.to
    if Path.cwd().is_relative_to(to.resolve()):
        raise InputError(
            f"--to {to} holds the folder this runs in, which cannot be replaced: expected a new "
            "or empty folder; give another"
        )
    if to.exists() and not to.is_dir():
        raise InputError(f"--to {to} is a file: expected a folder, new or empty; give another")
    if to.is_dir() and any(to.iterdir()) and not settings.force:
        raise InputError(
            f"--to {to} has something in it: expected a new or empty folder; give another, or "
            "--force to replace all it holds"
        )
    if settings.repository is not None:
        require_pushable(settings.repository)


def _adapter_of(chosen: ChosenModel) -> Path:
    return Path(chosen.source).with_name(_ADAPTER)


def _dtype(settings: ExportSettings, source: Path) -> str:
    """The number format to write: as asked for, or the model's own. Loads torch."""
    from headwater.models.loading import stored_dtype

    dtype = settings.dtype or str(stored_dtype(source)).removeprefix("torch.")
    if settings.format == "gguf":
        from headwater.models.gguf import require_writable

        require_writable(str(read_config(source).get("model_type")), dtype)
    return dtype


def _write(
    source: Path, writing: Path, settings: ExportSettings, dtype: str, name: str
) -> str | None:
    """Write weights and tokenizer; returns the name of the GGUF file, if it is one."""
    import torch

    from headwater.models.loading import load_model, load_tokenizer, stored_dtype
    from headwater.models.saving import save_model

    model = load_model(source, dtype=stored_dtype(source))
    tokenizer = load_tokenizer(source)
    if settings.format == "hf":
        save_model(model, tokenizer, writing, dtype=getattr(torch, dtype))
        return None
    from headwater.models.gguf import write_gguf

    file = f"{name}-{dtype}.gguf"
    write_gguf(model, tokenizer, writing / file, dtype=dtype, name=name)
    return file


def _write_card(
    chosen: ChosenModel,
    source: Path,
    writing: Path,
    settings: ExportSettings,
    dtype: str,
    file: str | None,
) -> None:
    """Write README.md and the recipe of a run's model; a folder's own README.md comes along."""
    trained = chosen.trained
    if trained is None:
        card = source / CARD_FILE
        if card.is_file():
            shutil.copyfile(card, writing / CARD_FILE)
        return
    recipe = trained.run_dir / RECIPE_FILE
    results = read_results(trained.run_dir) if _is_reported(trained) else None
    subject = CardSubject(
        arm=trained.plan.arm,
        seed=trained.plan.seed,
        role=trained.role,
        fingerprint=trained.fingerprint,
        dtype=dtype,
        format=settings.format,
        file=file,
        repository=settings.repository,
    )
    text = render_card(subject, trained.record, load_recipe(recipe), results)
    (writing / CARD_FILE).write_text(text, encoding="utf-8")
    shutil.copyfile(recipe, writing / RECIPE_FILE)


def _is_reported(trained: TrainedModel) -> bool:
    return (trained.run_dir / RESULTS_FILE).is_file()
