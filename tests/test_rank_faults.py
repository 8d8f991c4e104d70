"""Stages of two ranks that go wrong: told as of one process, in moments, and begun again."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.errors import StageError
from test_workflow_run import numbers, start
from workflow_stages import CRASH, FULL

pytestmark = pytest.mark.slow
ARMS = {"arms": {"cold": {"student": ["grpo"]}}, "contrasts": []}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of single processes that nothing disturbed."""
    world = tmp_path_factory.mktemp("straight")
    start(world, **ARMS)
    return world


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (CRASH, "grpo on .*failed: KeyError: 'missing'"),
        (FULL, "grpo on .*no space left on the disk .*the same command"),
    ],
)
def test_an_error_that_is_not_ours_is_told_in_words(
    fault: str, words: str, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / fault).write_text("grpo")
    with pytest.raises(StageError, match=words):
        start(tmp_path, **ARMS, compute={"processes": 1, "ranks": 2})
    start(tmp_path, **ARMS, compute={"processes": 1, "ranks": 2})
    assert numbers(tmp_path) == numbers(straight)
