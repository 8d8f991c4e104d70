"""The files of cached teacher rollouts, which `engine.cached_targets` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save_file

from headwater.stages.rollouts import ROLLOUT_SCHEMA

#: Columns of `rollouts.parquet` where others train on its rollouts.
ROLLOUT_IDS_SCHEMA = ROLLOUT_SCHEMA.append(pa.field("prompt_ids", pa.list_(pa.int32()))).append(
    pa.field("response_ids", pa.list_(pa.int32()))
)


def save_targets(
    folder: Path, step: int, lengths: Sequence[int], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a batch's distributions beside its rollouts: hidden_TH, or ids_TK and logprobs_TK.

    lengths: response tokens of each rollout, in the order of its rows of T.
    """
    offsets = torch.tensor([0, *accumulate(lengths)])
    save_file({"offsets": offsets, **tensors}, folder / f"targets-{step:05d}.safetensors")
