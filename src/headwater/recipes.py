"""The shipped recipes: where they are, what each is for, and copies to edit.

The files live in the checkout's `recipes/` and travel inside the wheel as package data (in the
checkout that place is a link to the same folder).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from headwater.errors import InputError
from headwater.near_names import choose

_PACKAGED = Path(__file__).with_name("recipes")
_CHECKOUT = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A recipe that comes with headwater; `about` is the first comment of its file."""

    name: str
    path: Path
    about: str

    def as_dict(self) -> dict[str, str]:
        """Field name -> text."""
        return {key: str(value) for key, value in asdict(self).items()}


def shipped_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe by name. Raises InputError when the installation lacks them."""
    folder = next((place for place in (_PACKAGED, _CHECKOUT) if place.is_dir()), None)
    if folder is None:
        raise InputError(f"{_PACKAGED}: the shipped recipes are missing; install headwater again")
    paths = sorted(folder.glob("*.yaml"))
    return [ShippedRecipe(path.stem, path, _first_comment(path)) for path in paths]


def find_recipe(name_or_path: str | Path) -> Path:
    """The file meant by a path, or by the name of a shipped recipe.

    A path that exists wins. `quickstart`, `quickstart.yaml` and `recipes/quickstart.yaml` all
    mean the shipped recipe where no such file is at hand. Raises InputError for neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"{path}: a folder, expected a recipe file; give the YAML file in it")
    shipped = {recipe.name: recipe.path for recipe in shipped_recipes()}
    name = path.name.removesuffix(".yaml")  # a name may hold a dot: qwen3-1.7b
    at_hand = path.parent in (Path(), Path("recipes"))
    if at_hand and name in shipped:
        return shipped[name]
    if at_hand and path.suffix in ("", ".yaml"):
        raise InputError(
            f"{path}: no such recipe, neither a file nor a shipped one; {choose(name, shipped)}"
        )
    raise InputError(
        f"{path}: no such recipe; give a YAML file, or one of the shipped {', '.join(shipped)}"
    )


def is_recipe(name_or_path: str) -> bool:
    """Whether this means a recipe: a YAML file's name, or the name of a shipped one."""
    path = Path(name_or_path)
    return path.suffix in (".yaml", ".yml") or name_or_path in {r.name for r in shipped_recipes()}


def copy_recipe(name: str, to: Path | None = None) -> Path:
    """Copy a shipped recipe to `to` (a file or a folder; default ./NAME.yaml) for editing.

    Returns the new file. Raises InputError for an unknown name or when the file exists already.
    """
    source = find_recipe(name)
    target = Path(source.name) if to is None else to
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise InputError(f"{target}: exists already and is kept; give another place with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def _first_comment(path: Path) -> str:
    """The first paragraph of the comment a recipe begins with."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or (words and line == "#"):
            break
        words.append(line.lstrip("# ").strip())
    return " ".join(words).strip()
