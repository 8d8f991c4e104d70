"""Compiles the kernels in kernels/ on first use, for the processor at hand.

A C compiler is all it takes; it runs once for each number format, two seconds, and what it made is
kept in the user's cache folder. Where there is none, or the processor has nothing to gain, the
engine computes with torch's own operations: slower, and the same up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from headwater.engine.cpu import cpuinfo, has_amx, has_fast_bf16

#: Set to 0: torch's own operations everywhere.
SWITCH = "HEADWATER_KERNELS"
NO_COMPILER = "no C compiler (cc, gcc or clang) on the PATH"
_SOURCES = ("decode.c", "draw.h", "products.h")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fPIC",
    "-shared",
)
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_RUNTIMES = ("libgomp", "libiomp5", "libomp")


@dataclass(frozen=True, slots=True)
class Built:
    """The compiled kernels of one number format, or why there are none.

    failed: there are none, though the processor has a use for them.
    """

    library: ctypes.CDLL | None
    why: str
    failed: bool = False


def built(dtype: torch.dtype) -> Built:
    """The kernels for models of this format on this machine; compiled by the first who asks."""
    return Built(None, f"{SWITCH}=0") if switched_off() else _built(dtype)


def switched_off() -> bool:
    """Whether the environment asks to do without."""
    return os.environ.get(SWITCH) == "0"


@lru_cache
def _built(dtype: torch.dtype) -> Built:
    reason = _unsuited(dtype)
    if reason:
        return Built(None, reason)
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return Built(None, NO_COMPILER, failed=True)
    try:
        return Built(_load(compiler, int(dtype == torch.bfloat16)), f"compiled with {compiler}")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        why = f"{compiler} could not compile them: {said.strip()[:200]}"
        return Built(None, why, failed=True)


def _unsuited(dtype: torch.dtype) -> str:
    """Why this processor has no use for kernels of a format; empty where it has."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"written for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    said = cpuinfo()
    if dtype == torch.float32:
        return "" if " avx2 " in said and " fma " in said else "no AVX2 and FMA"
    if dtype != torch.bfloat16:
        return f"not written for {dtype}"
    if has_amx(said):
        return "torch's products on AMX are faster"
    return "" if has_fast_bf16(said) else "no fast AVX512-BF16"


def _load(compiler: str, is_bf16: int) -> ctypes.CDLL:
    folder = Path(__file__).parent / "kernels"
    flags = (*_FLAGS, f"-DHW_BF16={is_bf16}")
    stamp = str(Path(compiler).resolve().stat().st_mtime_ns)
    known = hashlib.sha256("\0".join((compiler, stamp, *flags, _instructions())).encode())
    for name in _SOURCES:
        known.update((folder / name).read_bytes())
    name, command = (
        f"{known.hexdigest()[:20]}.so",
        [compiler, *flags, str(folder / _SOURCES[0]), "-lm"],
    )
    try:
        return _kept_in(_cache_folder(), name, command)
    except OSError:  # it cannot be written, or forbids to run what it holds
        with tempfile.TemporaryDirectory(prefix="headwater-kernels-") as elsewhere:
            return _kept_in(Path(elsewhere), name, command)


def _kept_in(folder: Path, name: str, command: list[str]) -> ctypes.CDLL:
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = folder / f"{name}.{os.getpid()}.tmp"
        subprocess.run(  # noqa: S603 - a compiler on our own sources
            [*command, "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
        )
        made.replace(path)  # another process may have been faster: with the same bytes
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "headwater" / "kernels"


def _instructions() -> str:
    """What the processor can do: a home folder may be shared by machines that differ."""
    lines = cpuinfo().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


@lru_cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch computes with in this process; None where it has none."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    for path in sorted(paths, key=lambda path: ("/torch/" not in path, path)):  # others have theirs
        if Path(path).name.startswith(_RUNTIMES):
            return ctypes.CDLL(path)
    return None
