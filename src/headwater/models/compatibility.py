"""May this teacher teach this student? The same tokens, the same marks, the same chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headwater.errors import InputError
from headwater.models.config_file import decoder_config, read_config
from headwater.models.loading import load_tokenizer
from headwater.models.vocabulary import usable_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CURE = "choose a teacher and a student of one family, or give both folders one tokenizer"
PROBE_MESSAGES = [{"role": "user", "content": "1+1=?"}]
PROBE_ANSWER = [*PROBE_MESSAGES, {"role": "assistant", "content": "2"}, *PROBE_MESSAGES]
SHOWN_CHARACTERS = 40


def check_same_tokenizer(student_dir: Path, teacher_dir: Path) -> None:
    """Check that both models read and write the same tokens under the same ids.

    Both embeddings may be padded, each to its own size: stages slice the logits of both to
    `usable_vocabulary`, so that padding rows carry no mass. The padding token may differ, since
    no loss reads it. Raises InputError naming the first token, special token or place in the
    rendered chat that differs, and for an embedding with fewer rows than its tokenizer has ids.
    """
    student, teacher = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    _check_tokens(student, teacher)
    _check_special_tokens(student, teacher)
    _check_splitting(student, teacher)
    _check_chat(student, teacher)
    used = usable_vocabulary(student)
    for role, path in (("student", student_dir), ("teacher", teacher_dir)):
        rows = _embedding_rows(path)
        if rows < used:
            raise InputError(
                f"the {role}'s embedding in {path} has {rows} rows, its tokenizer {used} ids: "
                "expected a row for every id; use the tokenizer the model was trained with"
            )


def _check_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    ids_s, ids_t = student.get_vocab(), teacher.get_vocab()
    differing = [
        token for token in ids_s.keys() | ids_t.keys() if ids_s.get(token) != ids_t.get(token)
    ]
    if not differing:
        return
    by_id = {token: min(ids.get(token, 1 << 62) for ids in (ids_s, ids_t)) for token in differing}
    first = min(differing, key=lambda token: (by_id[token], token))
    raise InputError(
        f"student and teacher have different tokenizers: token {first!r} is "
        f"{_id_text(ids_s, first)} in the student and {_id_text(ids_t, first)} in the teacher "
        f"(the first of {len(differing)} differing tokens); expected the same ids; {CURE}"
    )


def _id_text(ids: dict[str, int], token: str) -> str:
    return f"id {ids[token]}" if token in ids else "missing"


def _check_special_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    pairs = {
        "end token (eos_token)": (student.eos_token, teacher.eos_token),
        "start token (bos_token)": (student.bos_token, teacher.bos_token),
        "unknown token (unk_token)": (student.unk_token, teacher.unk_token),
    }
    padding = {student.pad_token, teacher.pad_token}
    marks_s, marks_t = _marks(student), _marks(teacher)
    for token in sorted((marks_s ^ marks_t) - padding):
        pairs[f"special token {token!r}"] = (
            "special" if token in marks_s else "ordinary",
            "special" if token in marks_t else "ordinary",
        )
    for name, (of_student, of_teacher) in pairs.items():
        if of_student != of_teacher:
            raise InputError(
                f"student and teacher have different special tokens: {name} is {of_student!r} in "
                f"the student and {of_teacher!r} in the teacher; expected the same; {CURE}"
            )


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that text cannot spell by accident: they are matched whole and left out of answers."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def _check_splitting(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    text = _render(student, PROBE_ANSWER, generation=True)
    pieces_s = student.convert_ids_to_tokens(student(text, add_special_tokens=False).input_ids)
    pieces_t = teacher.convert_ids_to_tokens(teacher(text, add_special_tokens=False).input_ids)
    if pieces_s != pieces_t:
        at = _first_difference(pieces_s, pieces_t)
        raise InputError(
            f"student and teacher split the same text differently: at token {at} of {text!r}, "
            f"{pieces_s[at : at + 3]} in the student and {pieces_t[at : at + 3]} in the teacher; "
            f"expected the same tokens; {CURE}"
        )


def _check_chat(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    if student.chat_template == teacher.chat_template:
        return
    for messages, generation in ((PROBE_MESSAGES, True), (PROBE_ANSWER, False)):
        text_s, text_t = (_render(t, messages, generation) for t in (student, teacher))
        if text_s != text_t:
            at = _first_difference(text_s, text_t)
            shown_s, shown_t = (text[at : at + SHOWN_CHARACTERS] for text in (text_s, text_t))
            raise InputError(
                f"student and teacher have different chat templates: after {text_s[:at]!r} the "
                f"student's writes {shown_s!r} and the teacher's {shown_t!r}; expected the same "
                f"text; copy chat_template.jinja from one folder to the other, or {CURE}"
            )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, tokenize=False, enable_thinking=False
    )


def _first_difference(left: str | list[str], right: str | list[str]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _embedding_rows(path: Path) -> int:
    return int(decoder_config(read_config(path))["vocab_size"])
