"""Random numbers from names, never from how often something was called.

A key is derived from (root seed, stage, step, problem, sample); two calls with the same
names give the same numbers whatever happened in between, so a resumed run, a run with
another batch size and a straight run draw alike.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(*names: int | str) -> int:
    """64-bit key of a tuple of names (root seed, stage, step, problem, sample, ...).

    >>> derive_key(0, "grpo", 3) == derive_key(0, "grpo", 3)
    True
    >>> derive_key(0, "grpo", 3) == derive_key(0, "grpo", "3")
    False
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*names: int | str) -> np.random.Generator:
    """A numpy generator seeded by `derive_key(*names)`."""
    return np.random.Generator(np.random.Philox(key=derive_key(*names)))


def uniforms(keys: np.ndarray, start: int, count: int) -> np.ndarray:
    """Counter-based uniforms in (0, 1): row i, column t depends on keys[i] and start + t only.

    keys: uint64 [N]; returns float32 [N, count] (23 random bits each, so that none
    rounds to 1), by the splitmix64 finaliser over key + (start + t + 1) * golden.
    """
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64)[:, None] + counters[None, :]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
