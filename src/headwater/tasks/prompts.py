r"""Prompts and worked solutions as tokens: the only place that encodes them.

A prompt form says in which form the answer is wanted and how a supervised solution gives it.
A form is only trained with a verifier that reads it: a prompt asking for `\boxed{}` graded by
a verifier looking for "Answer:" trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from headwater.errors import InputError
from headwater.near_names import near
from headwater.tasks.chat_template import render_messages
from headwater.tasks.final_answers import last_boxed
from headwater.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FormName = Literal["boxed", "hash", "answer_is", "bare"]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """instruction: what is asked for after the problem; closing: the last line of a worked
    solution, with `{answer}` for the final answer. Both are None in the bare form."""

    name: FormName
    instruction: str | None
    closing: str | None


FORMS: Mapping[str, PromptForm] = MappingProxyType(
    {
        form.name: form
        for form in (
            PromptForm(
                "boxed",
                r"Reason step by step, and put your final answer within \boxed{}.",
                r"\boxed{{{answer}}}",
            ),
            PromptForm(
                "hash",
                "Reason step by step, and end with a line of #### followed by your final answer.",
                "#### {answer}",
            ),
            PromptForm(
                "answer_is",
                'Reason step by step, and end with the sentence "The answer is" followed by your '
                "final answer.",
                "The answer is {answer}.",
            ),
            PromptForm("bare", None, None),
        )
    }
)


def prompt_form(form: str) -> PromptForm:
    """The form named `form`. Raises InputError for an unknown name."""
    if form not in FORMS:
        raise InputError(
            f"prompt form {form!r} is unknown; use one of {', '.join(FORMS)}{near(form, FORMS)}"
        )
    return FORMS[form]


def render(problem: Problem, form: str) -> str:
    """The user's message: the problem and, unless bare, the form the answer is wanted in.

    >>> render(Problem("p", "What is 2+2?", "doc"), "bare")
    'What is 2+2?'
    """
    instruction = prompt_form(form).instruction
    return problem.prompt if instruction is None else f"{problem.prompt}\n\n{instruction}"


def chat_messages(problem: Problem, form: str) -> list[dict[str, str]]:
    """The messages before a problem's question, and the question."""
    said = [*problem.before, ("user", render(problem, form))]
    return [{"role": role, "content": text} for role, text in said]


def render_solution(form: str, solution: str | None, answer: str) -> str:
    r"""The supervised response: the worked solution, ending in the answer as the form asks.

    A solution that already ends so is left as it is; the bare form leaves every solution as
    it is, and so does every form where no answer is known. Without a solution the answer stands
    alone.

    >>> render_solution("boxed", "1+1 = 2", "2")
    '1+1 = 2\n\\boxed{2}'
    """
    closing = prompt_form(form).closing
    worked = (solution or "").strip()
    if closing is None or not answer:
        return worked or answer
    line = closing.format(answer=answer)
    if worked.endswith(line) or (form == "boxed" and last_boxed(worked) == answer):
        return worked
    return f"{worked}\n{line}" if worked else line


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, form: str) -> list[int]:
    """Token ids of the problem as a chat, up to where the assistant's answer begins.

    The model's own chat template, with thinking switched off where the template knows it.
    Raises InputError for a tokenizer without a template or without a token for some character.
    """
    return _encode_chat(tokenizer, f"problem {problem.id!r}", chat_messages(problem, form))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Token ids of messages of {role, content}, up to where the assistant's next answer begins.

    Raises InputError as `encode_prompt` does.
    """
    return _encode_chat(tokenizer, "the conversation", messages)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], form: str
) -> list[list[int]]:
    """`encode_prompt` of each problem, several times as fast. Raises InputError as it does."""
    if not problems:
        return []
    ids = None
    if tokenizer.chat_template:
        chats = [render_messages(tokenizer, chat_messages(p, form)) for p in problems]
        ids = _known_ids(tokenizer, chats)
    # One by one where something is wrong, which names the problem.
    return ids or [encode_prompt(tokenizer, problem, form) for problem in problems]


def encode_response(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, response: str
) -> list[int]:
    """Token ids of a response to `problem`, on its own, with the end token behind it.

    Raises InputError for a tokenizer without end token or without a token for some character.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no end token, so that a response could not "
            "end; set eos_token in its tokenizer_config.json"
        )
    return [*_encode_text(tokenizer, f"problem {problem.id!r}", response), end]


def check_prompt_matches_verifier(
    form: str, verifier_reads: Set[str], verifier_name: str, example_accepted: bool | None = None
) -> None:
    """Refuse a prompt that asks for the answer in a form the verifier does not read.

    verifier_reads: forms the verifier reads. example_accepted: whether the verifier accepted a
    completion of the task that ends as the form asks, None if the task has none; the bare form,
    which asks for nothing, needs it. Raises InputError.
    """
    readable = [name for name in FORMS if name in verifier_reads]
    if prompt_form(form).instruction is not None:
        if form not in verifier_reads:
            raise InputError(
                f"task.prompt: {form} asks for an answer that verifier {verifier_name} does not "
                f"read; use prompt: {' or '.join(readable) or 'bare'}, or another verifier"
            )
        if example_accepted is False:
            raise InputError(
                f"task.prompt: {form} asks for an answer that verifier {verifier_name} does not "
                "accept: gold answers given in this form were refused; use the form it looks for, "
                "or another verifier"
            )
    elif not example_accepted:
        found = (
            "the task has no worked example to try"
            if example_accepted is None
            else "a worked example of the task was not accepted"
        )
        shown = "rows with a worked `solution`, " if example_accepted is None else ""
        raise InputError(
            f"task.prompt: bare asks for no form of answer, and with verifier {verifier_name} "
            f"{found}; use prompt: {' or '.join(readable) or 'boxed'}, {shown}or another verifier"
        )


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, what: str, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned "
            "model, or set chat_template in its tokenizer_config.json"
        )
    for message in messages:
        _encode_text(tokenizer, what, message["content"])
    # The template writes the beginning-of-sequence token itself where there is one.
    return list(tokenizer.encode(render_messages(tokenizer, messages), add_special_tokens=False))


def _encode_text(tokenizer: PreTrainedTokenizerBase, what: str, text: str) -> list[int]:
    """Ids of a text, all of which the tokenizer must know."""
    ids = _known_ids(tokenizer, [text])
    if ids is None:
        raise InputError(
            f"{what}: the tokenizer has no token for part of {text[:60]!r}; use a "
            "model whose tokenizer covers the text (embedded models read their own "
            "task only, such as 7+5=?*3=?, with prompt: bare)"
        )
    return ids[0]


def _known_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]] | None:
    """Ids of each text; None where the tokenizer lacks a token for part of one."""
    try:
        ids = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    except Exception as error:
        # A word-level tokenizer without unknown token raises exactly this bare class.
        if type(error) is not Exception:
            raise
        return None
    unknown = tokenizer.unk_token_id
    return None if unknown is not None and unknown in chain.from_iterable(ids) else ids
