"""What the processor can do."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache
def cpuinfo() -> str:
    """/proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def has_amx(cpuinfo: str) -> bool:
    """Whether a CPU with this /proc/cpuinfo multiplies bfloat16 tiles."""
    return "amx_bf16" in cpuinfo


def has_fast_bf16(cpuinfo: str) -> bool:
    """Whether a CPU with this /proc/cpuinfo multiplies bfloat16 matrices faster than float32.

    AMX does, and so does AMD's AVX512-BF16. Intel's AVX512-BF16 without AMX does not: it takes
    twice the time of float32 products (`docs/log.md`), whatever the flag promises.
    """
    amd = "AuthenticAMD" in cpuinfo
    return has_amx(cpuinfo) or (amd and "avx512_bf16" in cpuinfo)
