"""Prompts as text and as tokens, and the check against the verifier."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headwater.errors import InputError
from headwater.models.tiny import tiny_tokenizer
from headwater.tasks.prompts import (
    FORMS,
    check_prompt_matches_verifier,
    encode_conversation,
    encode_prompt,
    encode_prompts,
    encode_response,
    render,
    render_solution,
)
from headwater.types import Problem
from headwater.verify.extract import ANSWER_FORMS, extract_answer

PROBLEM = Problem("p1", "What is 2+2?", "test")

THINKING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Every byte a token, ChatML with a thinking switch, and a token that begins a sequence."""
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=THINKING_TEMPLATE,
    )


def test_the_problem_comes_first_and_the_form_after_it() -> None:
    assert render(PROBLEM, "bare") == "What is 2+2?"
    assert render(PROBLEM, "boxed") == (
        "What is 2+2?\n\nReason step by step, and put your final answer within \\boxed{}."
    )
    with pytest.raises(InputError, match="form 'box' is unknown; use one of boxed, hash"):
        render(PROBLEM, "box")


@pytest.mark.parametrize(
    ("form", "solution", "text"),
    [
        ("boxed", "2+2=4", "2+2=4\n\\boxed{4}"),
        ("boxed", "so $\\boxed{4}$.", "so $\\boxed{4}$."),
        ("boxed", "not \\boxed{5}", "not \\boxed{5}\n\\boxed{4}"),
        ("boxed", None, "\\boxed{4}"),
        ("hash", "2+2=4", "2+2=4\n#### 4"),
        ("hash", "2+2=4\n#### 4", "2+2=4\n#### 4"),
        ("answer_is", "2+2=4", "2+2=4\nThe answer is 4."),
        ("bare", " 2+2=4 ", "2+2=4"),
        ("bare", None, "4"),
    ],
)
def test_a_solution_ends_in_the_answer_as_the_form_asks(
    form: str, solution: str | None, text: str
) -> None:
    assert render_solution(form, solution, "4") == text


@pytest.mark.parametrize("form", ANSWER_FORMS)
@pytest.mark.parametrize("answer", ["4", "-3/4", "\\frac{1}{2}", "1.5"])
def test_the_verifier_extracts_what_a_solution_gives(form: str, answer: str) -> None:
    completion = render_solution(form, "Some work = 9.", answer)
    assert extract_answer(completion, form) == answer  # type: ignore[arg-type]


def test_every_form_that_asks_is_one_a_verifier_can_read() -> None:
    assert {name for name, form in FORMS.items() if form.instruction} == set(ANSWER_FORMS)


def test_a_prompt_is_one_user_turn_up_to_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode_prompt(tokenizer, PROBLEM, "bare")
    assert tokenizer.decode(ids) == (
        "<s><|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    asked = tokenizer.decode(encode_prompt(tokenizer, PROBLEM, "boxed"))
    assert render(PROBLEM, "boxed") in asked


def test_prompt_ids_are_those_of_the_library(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": render(PROBLEM, "hash")}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert encode_prompt(tokenizer, PROBLEM, "hash") == ids


def test_a_worked_solution_ends_with_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    response_ids = encode_response(tokenizer, PROBLEM, render_solution("boxed", "2+2=4", "4"))
    assert response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response_ids[:-1]) == "2+2=4\n\\boxed{4}"


def test_embedded_models_encode_bare_prompts_and_refuse_what_they_cannot_spell() -> None:
    tokenizer = tiny_tokenizer()
    chain = Problem("arithmetic-12+7", "12+7", "arithmetic")
    prompt_ids = encode_prompt(tokenizer, chain, "bare")
    response_ids = encode_response(tokenizer, chain, "12+7=19\n\\boxed{19}")
    assert (
        tokenizer.decode(prompt_ids) == "<|im_start|>user\n12+7<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(response_ids) == "12+7=19\n\\boxed{19}<|im_end|>"
    with pytest.raises(InputError, match=r"'arithmetic-12\+7': the tokenizer has no token for"):
        encode_prompt(tokenizer, chain, "boxed")


def word_tokenizer(**options: str) -> PreTrainedTokenizerBase:
    backend = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)


def test_unknown_words_are_refused_rather_than_trained() -> None:
    tokenizer = word_tokenizer(chat_template="{{ messages[0]['content'] }}", eos_token="<end>")
    assert encode_prompt(tokenizer, Problem("a", "two two", "t"), "bare") == [2, 2]
    with pytest.raises(InputError, match="'a': the tokenizer has no token for part of 'two three'"):
        encode_prompt(tokenizer, Problem("a", "two three", "t"), "bare")


def test_a_tokenizer_must_have_a_template_and_an_end() -> None:
    with pytest.raises(InputError, match="no chat template; use an instruction-tuned"):
        encode_prompt(word_tokenizer(), Problem("a", "two", "t"), "bare")
    endless = word_tokenizer(chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match="has no end token"):
        encode_response(endless, Problem("a", "two", "t"), "two")


def test_a_prompt_must_ask_for_what_the_verifier_reads() -> None:
    check_prompt_matches_verifier("boxed", {"boxed"}, "math")
    check_prompt_matches_verifier("bare", {"boxed"}, "math", True)
    with pytest.raises(InputError, match=r"boxed asks .* verifier mine does not accept"):
        check_prompt_matches_verifier("boxed", {"boxed", "hash"}, "mine", False)
    with pytest.raises(InputError, match=r"boxed asks .* verifier exact .*use prompt: hash or ans"):
        check_prompt_matches_verifier("boxed", {"answer_is", "hash"}, "exact")
    for example, says in ((None, "no worked example to try"), (False, "was not accepted")):
        with pytest.raises(InputError, match=rf"bare asks for no form.*{says}; use prompt: boxed"):
            check_prompt_matches_verifier("bare", {"boxed"}, "math", example)
    with pytest.raises(InputError, match="use prompt: boxed, rows with a worked `solution`, or"):
        check_prompt_matches_verifier("bare", {"boxed"}, "math")


def test_many_prompts_at_once_are_the_same_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = [PROBLEM, Problem("p2", "Ünïcode \\frac12 <s>", "test")]
    for form in FORMS:
        alone = [encode_prompt(tokenizer, problem, form) for problem in problems]
        assert encode_prompts(tokenizer, problems, form) == alone
    assert encode_prompts(tokenizer, [], "boxed") == []


def test_of_many_prompts_the_one_without_a_token_is_named() -> None:
    problems = [Problem("good", "1+1=?", "t"), Problem("bad", "what is π", "t")]
    with pytest.raises(InputError, match="problem 'bad': the tokenizer has no token"):
        encode_prompts(tiny_tokenizer(), problems, "bare")


def test_a_conversation_is_encoded_as_its_template_writes_it() -> None:
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2=?"},
    ]
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1=?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2=?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(encode_conversation(tokenizer, messages)) == text
    one = Problem("p", "2+2=?", "test")
    assert encode_conversation(tokenizer, messages[-1:]) == encode_prompt(tokenizer, one, "bare")
    with pytest.raises(InputError, match=r"the conversation: the tokenizer has no token"):
        encode_conversation(tokenizer, [{"role": "user", "content": "HELLO"}])
