"""The embedded models: real Qwen3 architectures in small, with a tokenizer of their own.

Nothing is downloaded and no weights are shipped: weights are drawn from a seed, and a
cached first stage trains them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headwater.models.tiny_sizes import (
    BOX_OPEN,
    END_TOKEN,
    MAX_POSITIONS,
    PAD_TOKEN,
    ROLES,
    SPECIAL_TOKENS,
    VOCABULARY,
    tiny_config_values,
)
from headwater.seeding import derive_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, the form of Qwen3 and SmolLM2, without a default system message."""


def tiny_config(name: str) -> Qwen3Config:
    """Configuration of the embedded model `name` ("teacher", "tiny:student", ...).

    Raises InputError for an unknown name.
    """
    return Qwen3Config(**tiny_config_values(name))


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that every embedded model shares: one id per character of `VOCABULARY`.

    Role names and the opening of a LaTeX box are one token each. `decode(encode(text))`
    is `text` for every text over the alphabet; encoding a character outside it raises
    (there is no unknown token that would hide it).
    """
    words = "|".join(re.escape(word) for word in (*ROLES, BOX_OPEN))
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(WordLevel(ids))
    backend.pre_tokenizer = Split(Regex(rf"{words}|[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(name: str, seed: int) -> PreTrainedModel:
    """The embedded model `name` with float32 weights drawn from `seed`, in eval mode.

    The global random state is left as it was. Raises InputError for an unknown name.
    """
    config = tiny_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, "tiny", name.removeprefix("tiny:")))
        model = Qwen3ForCausalLM(config)
    return model.eval()
