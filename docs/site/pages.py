"""Pages of the docs site made from the code and from files outside docs/ (mkdocs hooks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from headwater.cli.entry import app
from headwater.config.reference import recipe_reference

ROOT = Path(__file__).parents[2]

#: Links that lead out of docs/ in the repository, and the page that has the same on the site.
LINKS = {
    "../README.md#verbs": "commands.md",
    "../README.md#where-things-are": "modules.md",
    "../README.md": "index.md",
    "../benchmarks/README.md": "benchmarks.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {
        "recipe-reference.md": recipe_reference(),
        "commands.md": commands(),
        "modules.md": f"# Where things are\n\n{readme.partition('## Where things are')[2]}",
        "benchmarks.md": (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=_from_root(content)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links to the pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    for link, target in LINKS.items():
        markdown = markdown.replace(f"]({up}{link}", f"]({up}{target}")
    return markdown


def _from_root(markdown: str) -> str:
    """A file of the repository's root with links that lead from docs/."""
    for old, new in (
        ("](docs/", "]("),
        ("](../docs/", "]("),
        ("](LICENSE)", "](index.md)"),
        ("](CHANGELOG.md", "](changelog.md"),
        ("](CONTRIBUTING.md", "](contributing.md"),
        ("](benchmarks/README.md", "](benchmarks.md"),
        ("](README.md#where-things-are", "](modules.md"),
        ("](README.md", "](index.md"),
        ("](../README.md", "](index.md"),
    ):
        markdown = markdown.replace(old, new)
    return markdown


def commands() -> str:
    """Every verb with its arguments and options, as the command line has them."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands\n\nEvery verb; `headwater VERB --help` says the same with examples.\n"]
    for name, command in group.commands.items():
        given = [one for one in command.params if not getattr(one, "hidden", False)]
        arguments = [_in_usage(one) for one in given if one.param_type_name == "argument"]
        rows = "\n".join(f"| {_names(one)} | {_words(one)} |" for one in given)
        parts.append(
            f"## {name}\n\n{(command.help or '').strip()}\n\n"
            f"```text\n{' '.join(['headwater', name, *arguments, '[OPTIONS]'])}\n```\n\n"
            f"| option | does |\n| --- | --- |\n{rows}\n"
        )
    return "\n".join(parts)


def _in_usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    takes = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    return ", ".join(f"`{option}{takes}`" for option in parameter.opts)


def _words(parameter: Any) -> str:
    words = (parameter.help or "").replace("|", "\\|")
    default = parameter.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"{words} Default: `{default}`." if plain and "default" not in words else words
