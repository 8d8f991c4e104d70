"""The same bits every time, on a GPU too."""

from __future__ import annotations

import torch


def use_deterministic_algorithms() -> None:
    """From here on this process computes with algorithms that give the same bits every time.

    On a CPU ours do anyway. Where torch has no such algorithm for a GPU it warns, in the worker's
    log, which names the operation. cuBLAS is told by CUBLAS_WORKSPACE_CONFIG, before it starts.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
