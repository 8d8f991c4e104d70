"""A tokenizer as a GGUF file spells it: byte-level tokens, merges, and the name of how it splits.

llama.cpp has the ways to split text before merges built in, and a file only names one: a wrong
name would load, and read every prompt differently. So a split is named only where it is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwater.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the file format calls the kinds of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Patterns that are split by before merges -> the name they go by. They differ in digits.
_SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
_CURE = (
    "export --format hf and convert the folder with llama.cpp's convert_hf_to_gguf.py, which "
    "knows more tokenizers"
)


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """What a GGUF file says of a tokenizer.

    tokens, types: one an id, up to the rows of the embedding. merges: pairs "LEFT RIGHT", the
    earliest first; empty where every character is a token. split: how text is split before merges.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    split: str


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> GGUFVocabulary:
    """The tokenizer's vocabulary for a model whose embedding has `rows` rows.

    Known are byte-level BPE as GPT-2, SmolLM2, Qwen2, Qwen3 and Llama 3 have it, and the embedded
    models' tokens of one character. Ids without a token are named [PADid]. Raises InputError for
    any other tokenizer.
    """
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = plain["model"], plain["added_tokens"]
    if model["type"] == "BPE" and _is_byte_level(plain):
        spelled = {index: token for token, index in model["vocab"].items()}
        types = dict.fromkeys(spelled, NORMAL)
        merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        split = _split_name(plain["pre_tokenizer"])
    elif model["type"] == "WordLevel":
        spelled = {i: token if len(token) > 1 else _spell(token) for token, i in _words(model)}
        # Words are matched whole, as this tokenizer does; the rest is read byte by byte.
        types = {i: USER_DEFINED if len(token) > 1 else NORMAL for token, i in _words(model)}
        merges, split = (), "gpt-2"
    else:
        raise InputError(
            f"a tokenizer of kind {model['type']} cannot be written as GGUF here: expected "
            f"byte-level BPE, as Qwen, SmolLM2 and Llama 3 have; {_CURE}"
        )
    for token in added:
        spelled[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return GGUFVocabulary(
        tuple(spelled.get(i, f"[PAD{i}]") for i in range(rows)),
        tuple(types.get(i, UNUSED) for i in range(rows)),
        merges,
        split,
    )


def _words(model: Mapping[str, Any]) -> Sequence[tuple[str, int]]:
    return [(str(token), int(index)) for token, index in model["vocab"].items()]


def _is_byte_level(plain: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([plain["pre_tokenizer"], plain["decoder"]])


def _split_name(pre_tokenizer: Mapping[str, Any]) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = tuple(step["type"] for step in steps)
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ("ByteLevel",) and last["use_regex"]:
            return "gpt-2"
        if kinds == ("Digits", "ByteLevel") and steps[0]["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ("Split", "ByteLevel") and not last["use_regex"]:
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in _SPLITS and steps[0]["behavior"] == "Isolated":
                return _SPLITS[pattern]
    raise InputError(
        f"the tokenizer splits text by {json.dumps(pre_tokenizer)[:200]}, which has no name here "
        f"that llama.cpp knows it by: expected the way of GPT-2, SmolLM2, Qwen2 or Llama 3; {_CURE}"
    )


def _spell(text: str) -> str:
    """A text in the letters that byte-level tokenizers write bytes with: a space is \u0120."""
    return "".join(_BYTES[byte] for byte in text.encode())


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + place) for place, byte in enumerate(others)
    }


_BYTES = _byte_letters()
