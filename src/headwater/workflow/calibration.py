"""What a plan takes a machine to be capable of: every constant in one record, with its source.

Planning counts work exactly and divides by these. Those of a GPU come from data sheets or are
assumed; `benchmarks/calibrate.py` measures what it can on the machine at hand and writes a file
that replaces them (`headwater plan --calibration FILE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.plain_json import read_json_file

#: Models with fewer parameters than this compute at `small_flops`: their products are too small.
SMALL_PARAMETERS = 20_000_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates of one device (a GPU; on a CPU, one thread) and of what lies between several.

    training_flops, scoring_flops, decoding_flops: products a second, reached in forward and
    backward passes over long sequences, in forward passes alone, and in a step of decoding.
    small_flops: the same for models below `SMALL_PARAMETERS`; small_decoding_flops: their
    decoding. memory_bandwidth: bytes/s. decode_layer_seconds, train_layer_seconds: what a layer
    costs a decoding step, and a micro-batch's forward and backward pass, however little it
    computes. update_seconds: what an update costs besides its products and its memory.

    intra_bandwidth, inter_bandwidth: bytes/s that one device receives in an all-gather, inside a
    node and between nodes; collective_seconds: the latency of one collective, hop_seconds: what
    each further rank adds to it; exchange_seconds: one drawn token, told by its rank to all.
    overlap: the share of communication that computing can hide.
    host_bandwidth, host_memory_bandwidth: bytes/s between a device and its host's memory, and of
    that memory, a rank's share (cpu_offload).

    push_bandwidth, push_seconds: weights to a vLLM server, bytes/s and what each push costs
    besides. server_share: what a server of several devices reaches of their rates together.
    verifier_seconds: one graded answer in one verifier worker. ledger_seconds: one transaction.
    stage_seconds: starting a stage in a worker that is up, its kernels and graphs included, and
    publishing it; disk_bandwidth: bytes/s of weights read, hashed
    and written.

    sources: field -> where its value comes from; fields that are not in it are `assumed`.
    """

    about: str
    training_flops: float
    scoring_flops: float
    decoding_flops: float
    small_flops: float
    small_decoding_flops: float
    memory_bandwidth: float
    decode_layer_seconds: float
    train_layer_seconds: float
    update_seconds: float
    intra_bandwidth: float
    inter_bandwidth: float
    collective_seconds: float
    hop_seconds: float
    exchange_seconds: float
    overlap: float
    host_bandwidth: float
    host_memory_bandwidth: float
    push_bandwidth: float
    push_seconds: float
    server_share: float
    verifier_seconds: float
    ledger_seconds: float
    stage_seconds: float
    disk_bandwidth: float
    sources: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, name: str) -> str:
        """Where a constant comes from: a data sheet, a command of ours, a file, or `assumed`."""
        return self.sources.get(name, "assumed")

    def table(self) -> dict[str, tuple[float, str]]:
        """Every constant with its source."""
        return {name: (getattr(self, name), self.source_of(name)) for name in NUMBERS}

    def measured(self) -> tuple[str, ...]:
        """Names of the constants that somebody measured."""
        return tuple(name for name in NUMBERS if self.source_of(name).startswith("measured"))

    def training_rate(self, parameters: int) -> float:
        """FLOP/s of forward and backward passes of a model of so many parameters."""
        return self.small_flops if parameters < SMALL_PARAMETERS else self.training_flops

    def scoring_rate(self, parameters: int) -> float:
        """FLOP/s of forward passes."""
        return self.small_flops if parameters < SMALL_PARAMETERS else self.scoring_flops

    def decoding_rate(self, parameters: int) -> float:
        """FLOP/s of a decoding step's products."""
        return self.small_decoding_flops if parameters < SMALL_PARAMETERS else self.decoding_flops


#: Names of the constants, in order.
NUMBERS = tuple(item.name for item in fields(Calibration) if item.name not in ("about", "sources"))

_HERE = "measured (benchmarks/calibrate.py, a busy two-core CPU)"
_HOST = dict.fromkeys(("exchange_seconds", "verifier_seconds", "ledger_seconds"), _HERE)
_SHEET = "data sheet (NVIDIA H100 SXM)"

#: One H100 or H200 of a node of eight with NVLink, and one 400 Gbit/s adapter a GPU between nodes.
GPU = Calibration(
    about="H100-class GPU, from data sheets and assumptions",
    training_flops=0.40 * 989e12,
    scoring_flops=0.40 * 989e12,
    decoding_flops=0.40 * 989e12,
    small_flops=0.05 * 989e12,
    small_decoding_flops=0.05 * 989e12,
    memory_bandwidth=3.35e12,
    decode_layer_seconds=2e-5,
    train_layer_seconds=3e-4,
    update_seconds=0.05,
    intra_bandwidth=0.7 * 450e9,
    inter_bandwidth=0.7 * 50e9,
    collective_seconds=3e-5,
    hop_seconds=2e-6,
    exchange_seconds=2e-7,
    overlap=0.8,
    host_bandwidth=0.5 * 64e9,
    host_memory_bandwidth=2.5e10,
    push_bandwidth=1e9,
    push_seconds=0.5,
    server_share=0.8,
    verifier_seconds=1e-3,
    ledger_seconds=2e-3,
    stage_seconds=10.0,
    disk_bandwidth=1e9,
    sources={
        **_HOST,
        "training_flops": f"40% (assumed) of 989 TFLOP/s, {_SHEET}",
        "scoring_flops": f"40% (assumed) of 989 TFLOP/s, {_SHEET}",
        "decoding_flops": f"40% (assumed) of 989 TFLOP/s, {_SHEET}",
        "small_flops": f"5% (assumed) of 989 TFLOP/s, {_SHEET}",
        "small_decoding_flops": f"5% (assumed) of 989 TFLOP/s, {_SHEET}",
        "memory_bandwidth": _SHEET,
        "intra_bandwidth": f"70% (assumed) of 450 GB/s a direction, {_SHEET}",
        "inter_bandwidth": "70% (assumed) of 50 GB/s, data sheet (400 Gbit/s adapter)",
        "host_bandwidth": f"half (assumed) of 64 GB/s a direction, {_SHEET}",
    },
)

#: One thread of a server CPU.
CPU = Calibration(
    about="one thread of a server CPU",
    training_flops=1.5e11,
    scoring_flops=1.5e11,
    decoding_flops=1.0e11,
    small_flops=3e10,
    small_decoding_flops=1.5e10,
    memory_bandwidth=1.5e10,
    decode_layer_seconds=4e-4,
    train_layer_seconds=2e-3,
    update_seconds=5e-3,
    intra_bandwidth=1e8,
    inter_bandwidth=1e8,
    collective_seconds=3e-4,
    hop_seconds=1e-4,
    exchange_seconds=2e-7,
    overlap=0.0,
    host_bandwidth=1.5e10,
    host_memory_bandwidth=1.5e10,
    push_bandwidth=1e9,
    push_seconds=0.2,
    server_share=0.8,
    verifier_seconds=1e-3,
    ledger_seconds=2e-3,
    stage_seconds=3.0,
    disk_bandwidth=5e8,
    sources={**_HOST, "intra_bandwidth": _HERE, "disk_bandwidth": _HERE},
)


def default_calibration(device: str) -> Calibration:
    """The constants of `device`, "cuda" or "cpu", where no file gives others."""
    return GPU if device == "cuda" else CPU


def calibrated(path: Path, base: Calibration) -> Calibration:
    """`base` with the constants that a JSON file gives: {name: number, ..., "about": text}.

    Raises InputError for a file that cannot be read, a name that is no constant, or a value that
    is no positive number.
    """
    try:
        found = read_json_file(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--calibration {path}: {error}; expected a JSON file of constants, as "
            "benchmarks/calibrate.py writes: give its path, or leave the option out"
        ) from None
    if not isinstance(found, dict):
        raise InputError(
            f"--calibration {path} holds {type(found).__name__}, expected a JSON object of "
            "constants by name, as benchmarks/calibrate.py writes; write it anew"
        )
    about = found.pop("about", str(path.name))
    if not isinstance(about, str):
        raise InputError(f"--calibration {path}: about={about!r}, expected text; quote it")
    values = {name: _number(path, name, value) for name, value in found.items()}
    sources = dict.fromkeys(values, f"measured ({path.name})")
    return replace(base, about=about, sources={**base.sources, **sources}, **values)


def _number(path: Path, name: str, value: Any) -> float:
    if name not in NUMBERS:
        near = get_close_matches(name, NUMBERS, 1)
        cure = f"write {near[0]}" if near else "leave it out"
        raise InputError(
            f"--calibration {path}: unknown constant {name!r}, expected some of "
            f"{', '.join(NUMBERS)}; {cure}"
        )
    may_be_zero = name in ("overlap", "hop_seconds", "update_seconds", "stage_seconds")
    number = not isinstance(value, bool) and isinstance(value, int | float)
    is_share = name in ("overlap", "server_share")
    most = 1.0 if is_share else float("inf")
    if not number or not (0 <= value < float("inf")) or value > most or not (value or may_be_zero):
        wanted = "a share from 0 to 1" if is_share else "a number above 0"
        raise InputError(
            f"--calibration {path}: {name}={value!r}, expected {wanted}; measure it again with "
            "benchmarks/calibrate.py, or leave it out"
        )
    return float(value)
