"""Recipes, data and JSON that were made to fill memory, run without an end, or not be text."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from headwater.config.loading import load_recipe
from headwater.config.plain_yaml import parse_yaml
from headwater.errors import InputError
from headwater.plain_json import DEEPEST, parse_json, read_json_file
from headwater.recipes import shipped_recipes
from headwater.tasks import lines
from headwater.tasks.rows import read_rows
from headwater.verify.cases import read_cases


def alias_bomb(depth: int, wide: int = 9) -> str:
    """YAML of `depth` short lines that stands for wide ** depth values."""
    rows = ["a0: &a0 [" + ", ".join(["lol"] * wide) + "]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, depth)]
    return "\n".join(rows)


def test_a_kilobyte_of_aliases_that_stands_for_gigabytes_is_refused_at_once() -> None:
    text = alias_bomb(18)
    assert len(text) < 1_200
    started = time.monotonic()
    with pytest.raises(InputError, match=r"bomb\.yaml, line \d+: .* values once its aliases are"):
        parse_yaml(text, "bomb.yaml")
    assert time.monotonic() - started < 2.0


def test_aliases_of_ordinary_recipes_stay() -> None:
    assert parse_yaml("a: &x {lr: 1e-6}\nb: *x", "r") == {"a": {"lr": 1e-6}, "b": {"lr": 1e-6}}


def test_an_alias_inside_what_it_names_is_refused() -> None:
    with pytest.raises(InputError, match="line 1: an alias stands inside what it names"):
        parse_yaml("a: &x [1, *x]", "loop.yaml")


@pytest.mark.parametrize("depth", [80, 1_000])
def test_deep_nesting_is_an_error_with_a_cure(depth: int) -> None:
    with pytest.raises(InputError, match="nested"):
        parse_yaml("[" * depth + "]" * depth, "deep.yaml")


def test_yaml_builds_no_objects() -> None:
    for text in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system"):
        with pytest.raises(InputError, match="not valid YAML"):
            parse_yaml(text, "objects.yaml")


def test_numbers_too_long_to_be_written_out_are_refused() -> None:
    with pytest.raises(InputError, match="a number of more than 64 bits"):
        parse_yaml("seeds: [0x" + "f" * 20_000 + "]", "number.yaml")


def test_a_recipe_of_megabytes_is_refused_unread(tmp_path: Path) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_bytes(b"# " + b"x" * (5 * 2**20))
    with pytest.raises(InputError, match="at most 1,048,576 characters"):
        load_recipe(recipe)
    with pytest.raises(InputError, match="at most 1,048,576 are read"):
        parse_yaml("#" * (2**20 + 1), "--set")


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_shipped_recipes_are_far_below_the_limits(recipe) -> None:
    assert recipe.path.stat().st_size < 2**20 / 50
    load_recipe(recipe.path)


@pytest.mark.parametrize("depth", [DEEPEST + 1, 100_000])
def test_deep_json_is_refused(tmp_path: Path, depth: int) -> None:
    deep = '{"answer": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        parse_json(deep)
    data = tmp_path / "deep.jsonl"
    data.write_text(f'{{"problem": "1+1", "answer": "2"}}\n{deep}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"deep\.jsonl:2: not JSON \(nested deeper"):
        list(read_rows(str(data)))


def test_json_as_deep_as_allowed_is_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(text)) == text


def test_half_a_surrogate_pair_is_refused_where_it_enters(tmp_path: Path) -> None:
    data = tmp_path / "torn.jsonl"
    data.write_text('{"problem": "1+1 \\ud83d", "answer": "2"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"torn\.jsonl:1: .*\\ud83d is half of a surrogate pair"):
        list(read_rows(str(data)))
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_a_file_too_large_to_describe_anything_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(ValueError, match="more than the 268,435,456 that are read"):
        read_json_file(path)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE_BYTES", 100_000)
    monkeypatch.setattr(lines, "LARGEST_RATIO", 50)
    monkeypatch.setattr(lines, "_JUDGED_FROM_BYTES", 100_000)


def write_gz(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 9))
    return path


def test_a_compressed_line_without_an_end_is_refused(tmp_path: Path, small_limits: None) -> None:
    bomb = write_gz(tmp_path / "line.jsonl.gz", b"x" * 10_000_000)
    with pytest.raises(InputError, match=r"line\.jsonl\.gz:1: longer than 100,000 bytes"):
        list(read_rows(str(bomb)))
    with pytest.raises(InputError, match=r"line\.jsonl\.gz:1: longer than 100,000 bytes"):
        read_cases(bomb)


def test_compressed_lines_without_an_end_are_refused(tmp_path: Path, small_limits: None) -> None:
    row = b'{"problem": "1+1", "answer": "2", "note": "' + b" " * 10_000 + b'"}\n'
    bomb = write_gz(tmp_path / "rows.jsonl.gz", row * 500)
    with pytest.raises(InputError, match="decompresses to more than 50 times its"):
        list(read_rows(str(bomb)))
    bomb = tmp_path / "blank.jsonl"
    bomb.write_bytes(b"\n" * 100_001)
    with pytest.raises(InputError, match="more than 100,000 blank lines in a row"):
        list(read_rows(str(bomb)))


def test_an_ordinary_compressed_file_is_read(tmp_path: Path) -> None:
    rows = b"".join(b'{"problem": "%d+1", "answer": "%d"}\n' % (n, n + 1) for n in range(20_000))
    data = write_gz(tmp_path / "rows.jsonl.gz", rows)
    assert sum(1 for _ in read_rows(str(data))) == 20_000
