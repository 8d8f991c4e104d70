"""Teacher and student must speak alike; what differs first is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from headwater.errors import InputError
from headwater.models.compatibility import check_same_tokenizer
from headwater.models.saving import save_model
from headwater.models.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "model"
    save_model(tiny_model("tiny:small", seed=1), tiny_tokenizer(), path)
    return path


@pytest.fixture
def student(tmp_path: Path, teacher: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "student"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def padded_model(path: Path, rows: int) -> Path:
    config = tiny_config("tiny:student")
    config.vocab_size = rows
    save_model(Qwen3ForCausalLM(config), tiny_tokenizer(), path)
    return path


def test_same_tokenizers_share_the_whole_vocabulary(teacher: Path, student: Path) -> None:
    check_same_tokenizer(student, teacher)


def test_padded_embeddings_are_sliced_to_the_tokens_in_use(tmp_path: Path, teacher: Path) -> None:
    student = padded_model(tmp_path / "padded", 128)
    wider = padded_model(tmp_path / "wider", 192)
    check_same_tokenizer(student, teacher)
    check_same_tokenizer(teacher, student)
    check_same_tokenizer(student, wider)


def test_embedding_smaller_than_the_tokenizer_is_refused(tmp_path: Path, teacher: Path) -> None:
    student = padded_model(tmp_path / "short", 60)
    with pytest.raises(InputError, match=r"student's embedding in .* has 60 rows, .* 63 ids"):
        check_same_tokenizer(student, teacher)


def test_swapped_ids_name_the_first_token(teacher: Path, student: Path) -> None:
    def swap(values: dict) -> None:
        ids = values["model"]["vocab"]
        ids["7"], ids["8"] = ids["8"], ids["7"]

    edit(student / "tokenizer.json", swap)
    with pytest.raises(InputError, match=r"token '7' is id 16 in the student and id 15 in the"):
        check_same_tokenizer(student, teacher)


def test_missing_token_is_named(teacher: Path, student: Path) -> None:
    edit(student / "tokenizer.json", lambda values: values["model"]["vocab"].pop("z"))
    with pytest.raises(InputError, match=r"token 'z' is missing in the student and id 60 in the"):
        check_same_tokenizer(student, teacher)


def test_extra_token_is_named(teacher: Path, student: Path) -> None:
    backend = Tokenizer.from_file(str(student / "tokenizer.json"))
    backend.add_special_tokens(["<think>"])
    backend.save(str(student / "tokenizer.json"))
    with pytest.raises(InputError, match=r"'<think>' is id 63 in the student and missing in the"):
        check_same_tokenizer(student, teacher)


def test_different_end_tokens_are_named(teacher: Path, student: Path) -> None:
    edit(
        student / "tokenizer_config.json",
        lambda values: values.update(eos_token="<|im_start|>"),
    )
    with pytest.raises(
        InputError, match=r"end token \(eos_token\) is '<\|im_start\|>' in .* '<\|im_end\|>' in"
    ):
        check_same_tokenizer(student, teacher)


def test_token_special_on_one_side_only_is_named(teacher: Path, student: Path) -> None:
    def make_ordinary(values: dict) -> None:
        (entry,) = [e for e in values["added_tokens"] if e["content"] == "<|im_start|>"]
        entry["special"] = False

    edit(student / "tokenizer.json", make_ordinary)
    with pytest.raises(InputError, match=r"'<\|im_start\|>' is 'ordinary' in .* 'special' in"):
        check_same_tokenizer(student, teacher)


def test_padding_token_may_differ(teacher: Path, student: Path) -> None:
    edit(student / "tokenizer_config.json", lambda values: values.update(pad_token="<|im_end|>"))
    check_same_tokenizer(student, teacher)


def test_different_splitting_of_text_is_named(teacher: Path, student: Path) -> None:
    def split_at_roles_no_more(values: dict) -> None:
        values["pre_tokenizer"]["pattern"] = {"Regex": r"[\s\S]"}

    edit(student / "tokenizer.json", split_at_roles_no_more)
    with pytest.raises(InputError, match=r"split the same text differently: at token 1 .*'u', 's'"):
        check_same_tokenizer(student, teacher)


def test_different_chat_templates_name_the_place(teacher: Path, student: Path) -> None:
    template = (student / "chat_template.jinja").read_text()
    (student / "chat_template.jinja").write_text(
        template.replace("assistant\\n", "assistant\\n<|endoftext|>")
    )
    with pytest.raises(
        InputError, match=r"different chat templates: after .*assistant\\n' the student's writes"
    ):
        check_same_tokenizer(student, teacher)


def test_templates_spelled_otherwise_with_the_same_text_agree(teacher: Path, student: Path) -> None:
    path = student / "chat_template.jinja"
    path.write_text("{# ChatML #}" + path.read_text())
    check_same_tokenizer(student, teacher)


def test_folder_without_chat_template_is_refused(teacher: Path, student: Path) -> None:
    (student / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="student has no chat template"):
        check_same_tokenizer(student, teacher)


def test_loaded_tokenizer_is_the_saved_one(teacher: Path) -> None:
    read = PreTrainedTokenizerFast.from_pretrained(teacher)
    assert read.get_vocab() == tiny_tokenizer().get_vocab()
