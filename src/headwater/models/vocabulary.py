"""Which rows of an embedding and a head stand for a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def usable_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of leading ids that hold every token of the tokenizer: its largest id plus one.

    Not the number of its tokens, which is smaller where ids have gaps: the last tokens, often
    the end token among them, would be cut off. Rows beyond are padding and carry no mass.
    """
    return max(tokenizer.get_vocab().values()) + 1
