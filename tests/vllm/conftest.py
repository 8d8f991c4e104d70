"""Real vLLM servers, shared by the tests; skipped where there is no vLLM to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.rollout.vllm_process import ServerProcess, ServerSettings
from stage_jobs import make_model

PYTHON = os.environ.get("VLLM_PYTHON", "")
REASON = "needs vLLM: `make test-vllm` installs it (3 GB), or VLLM_PYTHON names its interpreter"
#: More than any test asks for at one place.
MAX_LOGPROBS = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it without vLLM."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if not PYTHON:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=80)


def _server(model: Path, folder: Path) -> ServerProcess:
    settings = ServerSettings(
        model=model,
        log=folder / "server.log",
        dtype="float32",
        on_cpu=True,
        python=PYTHON,
        max_logprobs=MAX_LOGPROBS,
    )
    return ServerProcess(settings)


@pytest.fixture(scope="session")
def student_server(
    student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with _server(student, tmp_path_factory.mktemp("student-server")) as process:
        yield process


@pytest.fixture(scope="session")
def teacher_server(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with _server(teacher, tmp_path_factory.mktemp("teacher-server")) as process:
        yield process
