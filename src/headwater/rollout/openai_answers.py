"""What a server that speaks OpenAI's API is asked, and its answers in the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from headwater.config.stages import Sampling
from headwater.config.teachers import OpenAITeacher
from headwater.errors import StageError
from headwater.models.vocabulary import usable_vocabulary
from headwater.tasks.prompts import chat_messages, encode_prompt, encode_response
from headwater.types import FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_AS_ID = "token_id:"  # how a server spells tokens that it was asked to give as ids


@dataclass(frozen=True, slots=True)
class Response:
    """A teacher's response. top: the likeliest (ids, log-probabilities) at each of its tokens."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    top: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class OpenAIDialogue:
    """Requests to one teacher, and how its answers are read.

    top_k: how many tokens at each place its distributions are wanted of; 0 for none.
    """

    teacher: OpenAITeacher
    tokenizer: PreTrainedTokenizerBase
    prompt_form: str
    sampling: Sampling
    top_k: int

    @property
    def path(self) -> str:
        """Where requests go, below the server's address."""
        return _PATHS[self.teacher.api]

    @property
    def _reads_tokens(self) -> bool:
        """Whether answers must come token by token, in the student's own tokens."""
        return self.top_k > 0 or self.teacher.api == "completions"

    def body(self, problem: Problem, count: int, seed: int) -> dict[str, Any]:
        """The request for `count` responses to a problem."""
        body: dict[str, Any] = {
            "model": self.teacher.model,
            "n": count,
            "temperature": self.sampling.temperature,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": seed,
        }
        if self.teacher.api == "completions":
            body["prompt"] = encode_prompt(self.tokenizer, problem, self.prompt_form)
            return body | {"logprobs": max(self.top_k, 1), "return_tokens_as_token_ids": True}
        body["messages"] = chat_messages(problem, self.prompt_form)
        return body | ({"logprobs": True, "top_logprobs": self.top_k} if self.top_k else {})

    def read(self, problem: Problem, count: int, answer: Mapping[str, Any]) -> list[Response]:
        """The responses in an answer. Raises StageError for what is none, or in other tokens."""
        choices = answer.get("choices")
        if not isinstance(choices, Sequence) or len(choices) != count:
            found = len(choices) if isinstance(choices, Sequence) else "no"
            raise StageError(
                f"{self.teacher.base_url} gives {found} choices to problem {problem.id!r}; "
                f"expected n={count}; use a server that takes n, or teacher_rollouts_per_prompt: 1"
            )
        try:
            return [self._response(problem, choice) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StageError(
                f"{self.teacher.base_url} answers problem {problem.id!r} in a form that cannot be "
                f"read ({type(error).__name__}: {error}); expected choices as OpenAI's "
                f"{self.path} gives{' with log-probabilities' if self._reads_tokens else ''}; use "
                "another server, or rollouts.api: chat with sample_sft, which needs text only"
            ) from None

    def _response(self, problem: Problem, choice: Mapping[str, Any]) -> Response:
        chat = self.teacher.api == "chat"
        text = str((choice["message"]["content"] or "") if chat else choice["text"])
        cut = choice["finish_reason"] == "length"
        if not self._reads_tokens:
            ids = encode_response(self.tokenizer, problem, text)
            ids = ids[:-1] if cut else ids
            cut = cut or len(ids) > self.sampling.max_new_tokens
            ids = ids[: self.sampling.max_new_tokens]
            return Response(text, tuple(ids), _finish(cut))
        places = (_chat_places if chat else _completion_places)(choice["logprobs"])
        ids = [self._id(token) for token, _ in places]
        self._check(problem, text, ids, cut)
        top = tuple(self._likeliest(problem, found) for _, found in places) if self.top_k else ()
        return Response(text, tuple(ids), _finish(cut), top)

    def _check(self, problem: Problem, text: str, ids: Sequence[int], cut: bool) -> None:
        """Whether text and tokens are one response to the student too."""
        spelt = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if spelt != text:
            raise StageError(
                f"model {self.teacher.model!r} answers problem {problem.id!r} with {text[:60]!r}, "
                f"whose tokens are {spelt[:60]!r} to the student: expected one tokenizer; choose a "
                "teacher of the student's family, or sample_sft with rollouts.api: chat"
            )
        if not cut and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            raise StageError(
                f"model {self.teacher.model!r} ends its answer to problem {problem.id!r} without "
                f"its end token: expected {self.tokenizer.eos_token!r} among the tokens, because "
                "the student learns where to end from it; use rollouts.api: completions of a "
                "server that gives it, or sample_sft with rollouts.api: chat"
            )

    def _likeliest(
        self, problem: Problem, found: Mapping[str, float]
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        if len(found) < self.top_k:
            raise StageError(
                f"{self.teacher.base_url} gives {len(found)} tokens at a place of problem "
                f"{problem.id!r}; expected {self.top_k} as targets.k says; lower targets.k, or let "
                "the server give more (vLLM: --max-logprobs)"
            )
        ranked = sorted(found.items(), key=lambda item: -item[1])[: self.top_k]
        ids = tuple(self._id(token) for token, _ in ranked)
        return ids, tuple(value for _, value in ranked)

    def _id(self, token: str) -> int:
        """The student's id of a token. Raises StageError for one that it does not have."""
        spelt = token.removeprefix(_AS_ID)
        if spelt != token and spelt.isascii() and spelt.isdigit():
            if int(spelt) < self._vocabulary:
                return int(spelt)
        elif token in self._by_text:
            return self._by_text[token]
        raise StageError(
            f"model {self.teacher.model!r} has a token {token!r} that is none of the student's, or "
            "several: expected one tokenizer; choose a teacher of the student's family behind a "
            "server that gives token ids (rollouts.api: completions of vLLM), or use sample_sft "
            "with rollouts.api: chat"
        )

    @cached_property
    def _vocabulary(self) -> int:
        return usable_vocabulary(self.tokenizer)

    @cached_property
    def _by_text(self) -> dict[str, int]:
        """Tokens by the text they stand for, where no other stands for it."""
        ids = sorted(self.tokenizer.get_vocab().values())
        texts = self.tokenizer.batch_decode([[token] for token in ids])
        found: dict[str, int] = {}
        repeated = set()
        for token, text in zip(ids, texts, strict=True):
            if text in found or "�" in text:
                repeated.add(text)
            found[text] = token
        return {text: token for text, token in found.items() if text not in repeated}


def _finish(cut: bool) -> FinishReason:
    return FinishReason.LENGTH if cut else FinishReason.STOP


#: A token as the server spells it, and what could have stood in its place.
_Place = tuple[str, Mapping[str, float]]


def _chat_places(logprobs: Mapping[str, Any]) -> list[_Place]:
    return [
        (
            str(one["token"]),
            {str(top["token"]): float(top["logprob"]) for top in one["top_logprobs"]},
        )
        for one in logprobs["content"]
    ]


def _completion_places(logprobs: Mapping[str, Any]) -> list[_Place]:
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return [
        (str(token), {str(other): float(value) for other, value in (top or {}).items()})
        for token, top in zip(logprobs["tokens"], tops, strict=True)
    ]
