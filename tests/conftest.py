"""Every test runs offline and on one thread, as a stage's worker does."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; inherited by worker processes
