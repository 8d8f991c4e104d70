"""Whether what a study asks fits a model, found before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.errors import InputError
from headwater.models.context_length import check_context
from headwater.models.sources import materialise
from headwater.tasks.readings import Reading
from headwater.types import Problem

SHORT, LONG = Problem("short", "1+1=?", "t"), Problem("long", "1+1+1+1+1=?", "t")
#: "<|im_start|>user\n" and "<|im_end|>\n<|im_start|>assistant\n"
CHAT = 3 + 2 + 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    materialise("tiny:student", folder)
    return folder


def check(model: Path, **fields: object) -> None:
    reading = Reading("pool labels", (SHORT, LONG), **fields)  # type: ignore[arg-type]
    check_context(model, "model student", "bare", [reading])


def test_prompt_and_response_may_fill_the_context_and_not_pass_it(model: Path) -> None:
    room = 1024 - (len(LONG.prompt) + CHAT)
    check(model, max_new_tokens=room)
    with pytest.raises(InputError) as caught:
        check(model, max_new_tokens=room + 1)
    assert str(caught.value) == (
        "problem 'long' of pool labels: a prompt of 19 tokens and max_new_tokens=1006 make 1025, "
        "but model student has 1024 positions (max_position_embeddings); set max_new_tokens to "
        "at most 1005, or choose a model with a longer context"
    )


def test_worked_responses_are_counted_with_their_end_token(model: Path) -> None:
    room = 1024 - (len(LONG.prompt) + CHAT) - 1
    check(model, responses=("2", "1" * room))
    with pytest.raises(InputError, match=r"'long' .* a worked response of 1006 make 1025.*leave"):
        check(model, responses=("2", "1" * (room + 1)))


def test_a_text_without_a_token_is_found_in_prompts_and_responses(model: Path) -> None:
    with pytest.raises(InputError, match="problem 'long': the tokenizer has no token"):
        check(model, responses=("2", "π"))
    other = Reading("evaluation set held_out", (SHORT, Problem("odd", "π?", "t")), 8)
    with pytest.raises(InputError, match="problem 'odd': the tokenizer has no token"):
        check_context(model, "model student", "bare", [other])


def test_a_config_without_a_limit_allows_any_length(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, max_new_tokens=100_000)
