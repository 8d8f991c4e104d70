"""What vLLM is given to answer with: a folder of safetensors, or the tensors of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from headwater.errors import StageError


class StaleWeights(StageError):
    """Answers come from other weights than those asked for, and these cannot be had again."""


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """The weights of a model in this process that trains on: those of one version, or none.

    Made, and given for the first time, while nothing changes them.

    tensors: the weights themselves, not copies, named as in the model's safetensors.
    present: the model's version, which changes before any weight does. version: the one meant.
    """

    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    present: Callable[[], int]
    version: int

    def check(self) -> None:
        """Raises StaleWeights once the model has begun to train on.

        Weights read between two checks that pass are all of `version`.
        """
        if (present := self.present()) != self.version:
            raise StaleWeights(
                f"vLLM needs the weights of version {self.version} again (it was started again, or "
                f"answered with others), and the model is at version {present}: run again, which "
                "continues from the last checkpoint, or choose servers with transfer=folder "
                "(without in_process), where every version's weights are kept until the next"
            )


#: A folder stays as it is until the next load; live weights are read while a load lasts.
Weights = Path | LiveWeights
