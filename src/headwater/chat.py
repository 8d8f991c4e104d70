"""`headwater chat`: a conversation with one model, by the engine's own sampler."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from headwater.config.compute import Compute
from headwater.config.evaluation import EvaluationSampling
from headwater.errors import InputError
from headwater.publishing.chosen import choose_model, model_folder
from headwater.seeding import derive_key
from headwater.tasks.prompts import encode_conversation, prompt_form, render
from headwater.types import FinishReason, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.rollout.sampler import Sampler


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How a conversation is held. system: a message before all others. prompt: the form that what
    is said is put in. seed: of the samples: the same words are answered the same way."""

    system: str | None
    prompt: str
    sampling: EvaluationSampling
    compute: Compute
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said. finish_reason: "stop", or "length" where the limit cut it off."""

    prompt: str
    text: str
    tokens: int
    finish_reason: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Listener:
    """Turns the ids drawn so far into text for whoever listens to the answer at hand."""

    tokenizer: PreTrainedTokenizerBase
    told: Callable[[str], None] | None = None

    def __call__(self, ids: list[int]) -> None:
        if self.told is None:
            return
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character is to come
            self.told(text)


@dataclass(frozen=True, slots=True)
class _Loaded:
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    listener: _Listener
    positions: int | None


class Chat:
    """A conversation. Use it as a context manager: a fetched model lies on disk for as long."""

    def __init__(self, model: str, settings: ChatSettings, *, arm: str | None = None) -> None:
        """Loads nothing yet. Raises InputError for a model or a form that does not exist."""
        prompt_form(settings.prompt)
        self._chosen = choose_model(model, arm=arm)
        self._settings = settings
        self._closing = ExitStack()
        self._loaded: _Loaded | None = None
        self.reset()

    @property
    def name(self) -> str:
        """The model's, as tables call it."""
        return self._chosen.name

    def __enter__(self) -> Chat:
        folder = self._closing.enter_context(model_folder(self._chosen, self._settings.seed))
        self._loaded = _load(folder, self._settings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()
        self._loaded = None

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        system = self._settings.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str, told: Callable[[str], None] | None = None) -> Answer:
        """The model's answer to `text`, after all that was said before.

        told: called with the answer so far whenever there is more of it.

        Raises InputError, and forgets `text`, where the model has no token for part of it or no
        position for what it would read and write.
        """
        from headwater.rollout.sampler import SampleRequest

        loaded = self._loaded
        assert loaded is not None, "a chat answers inside its `with` block"
        started = time.perf_counter()
        message = render(Problem("what was said", text, "chat"), self._settings.prompt)
        messages = [*self._messages, {"role": "user", "content": message}]
        ids = encode_conversation(loaded.tokenizer, messages)
        most = self._settings.sampling.max_new_tokens
        if loaded.positions is not None and len(ids) + most > loaded.positions:
            raise InputError(
                f"{len(ids)} tokens said and up to {most} to answer are more than the model's "
                f"{loaded.positions} positions; begin anew (/reset), or lower --max-new-tokens"
            )
        key = derive_key(self._settings.seed, "chat", *(one["content"] for one in messages))
        loaded.listener.told = told
        (rollout,) = loaded.sampler.sample([SampleRequest(tuple(ids), (key,))])[0]
        answer = loaded.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return Answer(
            prompt=text,
            text=answer,
            tokens=len(rollout.response_ids),
            finish_reason="length" if rollout.finish_reason is FinishReason.LENGTH else "stop",
            seconds=round(time.perf_counter() - started, 3),
        )


def _load(folder: Path, settings: ChatSettings) -> _Loaded:
    from headwater.engine.precision import resolve_device, resolve_dtype, settle_threads
    from headwater.models.context_length import position_limit
    from headwater.models.end_tokens import end_token_ids
    from headwater.models.loading import load_tokenizer
    from headwater.models.size import hidden_size
    from headwater.models.vocabulary import usable_vocabulary
    from headwater.rollout.sampler import InProcessSampler, SamplerSettings
    from headwater.rollout.scoring import FrozenModel

    device = resolve_device(settings.compute)
    dtype = resolve_dtype(settings.compute, device, hidden_size(folder))
    settle_threads(settings.compute.threads)
    tokenizer = load_tokenizer(folder)
    vocabulary = usable_vocabulary(tokenizer)
    model = FrozenModel.load(folder, device, dtype, vocabulary).model
    sampling = settings.sampling
    sampler = InProcessSampler(
        model,
        SamplerSettings(
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            end_ids=end_token_ids(model, tokenizer),
            vocab_size=vocabulary,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        ),
        max_rows=1,
        on_token=(listener := _Listener(tokenizer)),
    )
    return _Loaded(tokenizer, sampler, listener, position_limit(folder))
