"""What a wheel brings along, and what its metadata says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import headwater
from headwater.doctor import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = ROOT / "src" / "headwater"


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "headwater.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", headwater.__version__)


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^]]+)\]", changelog, re.MULTILINE)[0] == headwater.__version__


def test_every_file_beside_the_code_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["headwater"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    beside = {
        path
        for place in (PACKAGE, PACKAGE / "recipes")  # the latter is a link
        for path in place.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert beside == packaged


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_doctor_says_what_every_extra_is_for() -> None:
    assert set(EXTRAS) == set(PROJECT["project"]["optional-dependencies"])
