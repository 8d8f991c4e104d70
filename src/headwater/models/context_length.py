"""Whether what a study asks fits a model: a token for every text, a position for every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.errors import InputError
from headwater.models.config_file import decoder_config, read_config
from headwater.models.loading import load_tokenizer
from headwater.tasks.prompts import encode_prompts, encode_response
from headwater.tasks.readings import Reading
from headwater.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_context(
    model_dir: Path, name: str, prompt_form: str, readings: Sequence[Reading]
) -> None:
    """Encode everything the model in `model_dir`, called `name`, will read.

    Raises InputError naming the first problem whose text has no token, or whose prompt and
    response together need more positions than the model was made for (beyond them it
    extrapolates, without a sign).
    """
    positions = position_limit(model_dir)
    tokenizer = load_tokenizer(model_dir)
    encoded: dict[str, int] = {}
    for reading in readings:
        new = [
            p
            for p in {p.whole_text: p for p in reading.problems}.values()
            if p.whole_text not in encoded
        ]
        lengths = map(len, encode_prompts(tokenizer, new, prompt_form))
        encoded |= {p.whole_text: length for p, length in zip(new, lengths, strict=True)}
        for index, problem in enumerate(reading.problems):
            prompt = encoded[problem.whole_text]
            response = _response_tokens(tokenizer, reading, index)
            if positions is not None and prompt + response > positions:
                raise InputError(_too_long(name, reading, problem, prompt, response, positions))


def position_limit(model_dir: Path) -> int | None:
    """Most tokens a sequence may have; None for a model that sets no limit."""
    config = decoder_config(read_config(model_dir))
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def _response_tokens(tokenizer: PreTrainedTokenizerBase, reading: Reading, index: int) -> int:
    if not reading.responses:
        return reading.max_new_tokens
    return len(encode_response(tokenizer, reading.problems[index], reading.responses[index]))


def _too_long(
    name: str, reading: Reading, problem: Problem, prompt: int, response: int, positions: int
) -> str:
    if reading.responses:
        what, shorter = f"a worked response of {response}", "leave the problem out"
    else:
        what = f"max_new_tokens={response}"
        room = positions - prompt
        shorter = f"set max_new_tokens to at most {room}" if room > 0 else "leave the problem out"
    return (
        f"problem {problem.id!r} of {reading.where}: a prompt of {prompt} tokens and {what} make "
        f"{prompt + response}, but {name} has {positions} positions (max_position_embeddings); "
        f"{shorter}, or choose a model with a longer context"
    )
