"""The disk a study needs: bounded by what a run leaves, and told before hours of work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from headwater import api
from headwater.errors import InputError
from headwater.workflow.disk_need import DiskNeed, disk_need, published
from headwater.workflow.prepare import prepare_study
from small_study import study_file


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return study_file(tmp_path, steps=2)


@pytest.fixture
def little_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A megabyte is free on every disk."""
    found = SimpleNamespace(f_bavail=256, f_frsize=4096)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: found)
        yield


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_keeps_at_most_what_was_planned(recipe: Path, tmp_path: Path) -> None:
    study, out = prepare_study(api.load(recipe)), tmp_path / "run"
    need = disk_need(study, (), processes=1)
    assert api.plan(recipe, out).disk_bytes == need.total
    api.run(recipe, out, quiet=True)
    models = sum(_bytes(folder) for folder in out.glob("artifacts/*/model"))
    heads = [path.parent for path in out.glob("artifacts/*/head.safetensors")]
    assert heads
    targets = sum(_bytes(folder) for folder in heads)
    small = 40_000 * len(study.graph.nodes)  # tokenizers, tables, cards
    assert need.kept * 0.8 < models + targets < need.kept + small
    assert disk_need(study, published(study, out), processes=1) == DiskNeed(0, 0)
    assert api.plan(recipe, out).disk_bytes == 0


def test_two_processes_may_save_at_the_same_time(recipe: Path) -> None:
    study = prepare_study(api.load(recipe), planning=True)
    one, two = (disk_need(study, (), processes=n) for n in (1, 2))
    assert one.kept == two.kept
    assert two.besides == 2 * one.besides > 0


@pytest.mark.usefixtures("little_disk")
def test_a_plan_and_a_run_say_that_the_disk_is_too_small(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (told,) = (one for one in api.plan(recipe, out).warnings if "on disk" in one)
    assert told.startswith("the run may need ")
    assert f"and 1 MiB are free at {out}" in told and "--out" in told
    with pytest.raises(InputError, match=r"on disk.*--strict takes this for an error"):
        api.run(recipe, out, quiet=True, strict=True)
    assert not (out / "artifacts").exists()


def test_nothing_is_said_where_nobody_knows_or_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DiskNeed(1, 1).warning(tmp_path) is None
    assert DiskNeed(1 << 62, 0).warning(tmp_path) is not None

    def unknown(path: Path) -> None:
        raise OSError

    monkeypatch.setattr(os, "statvfs", unknown)
    assert DiskNeed(1 << 62, 0).warning(tmp_path) is None
