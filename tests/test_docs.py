"""The docs build without a warning, and the commands in them are ones that the program has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from headwater.cli import entry
from headwater.config.loading import load_recipe
from headwater.errors import InputError
from headwater.recipes import find_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
SHIPPED = {recipe.name for recipe in shipped_recipes()}


@dataclass(frozen=True)
class Command:
    """One `headwater` command of a page."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> Iterator[Command]:
    for page in dict.fromkeys(PAGES):
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"`(headwater [a-z][^`\n]*)`", text)
        for line in lines:
            words = shlex.split(line.partition(" | ")[0], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*|\$", words[0]):
                words = words[1:]
            if words[:1] == ["headwater"] and len(words) > 1:
                yield Command(page.name, tuple(words))


def options() -> dict[str, set[str]]:
    """Verb -> the names of its options."""
    group: Any = typer.main.get_command(entry.app)
    return {
        name: {"--help"}
        | {option for one in command.params for option in one.opts + one.secondary_opts}
        for name, command in group.commands.items()
    }


def test_the_pages_have_commands() -> None:
    assert len({str(one) for one in commands()}) > 40


@pytest.mark.parametrize("command", {str(one): one for one in commands()}.values(), ids=str)
def test_a_command_is_one_that_the_program_has(command: Command) -> None:
    verb, *rest = command.words[1:]
    if verb.startswith("-"):
        return
    known = options()
    assert verb in known, f"no verb {verb}"
    for word in rest:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            assert word.partition("=")[0] in known[verb], f"{verb} has no {word}"
    if verb in ("run", "plan", "pilot") and rest and rest[0] in SHIPPED:
        given = [value for word, value in pairwise(rest) if word == "--set"]
        profile = [value for word, value in pairwise(rest) if word == "--profile"]
        load_recipe(find_recipe(rest[0]), given, *profile)


def test_a_wrong_key_in_a_page_would_be_found() -> None:
    with pytest.raises(InputError, match="did you mean"):
        load_recipe(find_recipe("quickstart"), ["pools.label=64"])


def test_links_of_the_pages_lead_somewhere() -> None:
    broken = []
    for page in dict.fromkeys(PAGES):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            made = link in ("recipe-reference.md", "commands.md", "modules.md", "benchmarks.md")
            if "://" not in link and not made and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
        | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site/recipe-reference/index.html").read_text(encoding="utf-8")
    assert "Peak learning rate of AdamW." in reference
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', reference)
    assert fetched == [], "a reader's browser would fetch these from elsewhere"
