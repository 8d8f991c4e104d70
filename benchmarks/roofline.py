"""What the arithmetic of a step needs, and what this machine's matrix unit and memory give.

Counted is the work itself, not what an implementation happens to do: a prompt once per group, no
padding, causal attention over what is visible, the head on completion tokens only, weights read
once per pass. The least time of a phase is the larger of arithmetic / matrix rate and
bytes / bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headwater.models.size import model_size

#: AdamW reads master, gradient and two moments in float32 and writes all but the gradient.
_ADAMW_BYTES = 7 * 4


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic (a multiply-add is two operations) and bytes that have to move."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates: matrix products in the compute format, copies from memory to memory."""

    flops_per_second: float
    bytes_per_second: float

    def least_seconds(self, work: Work) -> float:
        """The time `work` takes at the measured rates, both at once."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: P prompts, and the tokens of each completion of each prompt's group."""

    prompt_lengths: Sequence[int]
    completion_lengths: Sequence[Sequence[int]]

    @property
    def targets(self) -> int:
        """Completion tokens: each is drawn, or learned from, once."""
        return sum(map(sum, self.completion_lengths))

    @property
    def body_tokens(self) -> int:
        """Tokens that go through the layers: the last one of a completion does not."""
        rows = sum(map(len, self.completion_lengths))
        return sum(self.prompt_lengths) + self.targets - rows

    @property
    def pairs(self) -> int:
        """(query, visible key) pairs of all body tokens."""
        total = 0
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            total += prompt * (prompt + 1) // 2
            total += sum((n - 1) * prompt + (n - 1) * n // 2 for n in completions)
        return total

    @property
    def cached_tokens_read(self) -> int:
        """Keys read while decoding, a prompt's once a step for its whole group."""
        total = 0
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            total += prompt * (max(completions) - 1)
            total += sum((n - 1) * n // 2 for n in completions)
        return total


class Model:
    """Counts of one model from its config.json, with weights of `element_bytes` each."""

    def __init__(self, config: Mapping[str, Any], element_bytes: int) -> None:
        size = model_size(config)
        self._element_bytes = element_bytes
        self._parameters = size.parameters
        self._head = size.vocabulary * size.hidden
        self._body = size.matmul_parameters - self._head
        self._kv_values = size.kv_values_per_token
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or size.hidden // heads
        self._pair_flops = 4.0 * size.layers * heads * head_dim

    def forward(self, shape: Shape) -> Work:
        """One pass over prompts and completions, with the head on completion tokens."""
        flops = 2.0 * (self._body * shape.body_tokens + self._head * shape.targets)
        flops += self._pair_flops * shape.pairs
        return Work(flops, float(self._element_bytes * (self._body + self._head)))

    def sampling(self, shape: Shape) -> Work:
        """Prefill and decoding: the weights are read once a step of the longest completion."""
        steps = max(max(group) for group in shape.completion_lengths)
        weights = steps * (self._body + self._head)
        cache = self._kv_values * shape.cached_tokens_read
        return Work(self.forward(shape).flops, float(self._element_bytes * (weights + cache)))

    def training(self, shape: Shape, *, recorded: bool = False) -> Work:
        """Forward and backward (twice a forward's arithmetic) and one AdamW step.

        recorded: the layers' forward pass was the sampler's; the head has one of its own.
        """
        flops = 3.0 * self.forward(shape).flops
        weights = 3 * self._parameters  # forward, backward, gradient
        if recorded:
            flops -= 2.0 * self._body * shape.body_tokens
            weights -= self._body
        update = (_ADAMW_BYTES + self._element_bytes) * self._parameters
        return Work(flops, float(self._element_bytes * weights + update))


def measure(dtype: torch.dtype, device: torch.device) -> Machine:
    """This machine's rates with torch's present thread count, best of several; about a second."""
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 28)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    product = _fastest(lambda: torch.mm(left, right, out=out), device)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return Machine(2.0 * size**3 / product, 2.0 * copied / copy)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    run()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(machine: Machine, work: Work, seconds: float) -> dict[str, float]:
    """What fraction of each rate a phase of `seconds` reached, and of the least time."""
    least = machine.least_seconds(work)
    return {
        "gflop": round(work.flops / 1e9, 3),
        "gbyte": round(work.bytes / 1e9, 3),
        "least_s": round(least, 4),
        "matrix_share": round(work.flops / machine.flops_per_second / seconds, 4),
        "bandwidth_share": round(work.bytes / machine.bytes_per_second / seconds, 4),
        "least_share": round(least / seconds, 4),
    }


def line(machine: Machine, phases: Mapping[str, Mapping[str, float]]) -> str:
    """One line for people: rates of the machine and what each phase reached of them."""
    rates = (
        f"ROOFLINE machine {machine.flops_per_second / 1e9:.0f} GFLOP/s "
        f"{machine.bytes_per_second / 1e9:.1f} GB/s"
    )
    parts = [
        f"{name} {100 * found['matrix_share']:.1f} % of the matrix rate, "
        f"{100 * found['bandwidth_share']:.1f} % of the bandwidth, least {found['least_s']:.2f} s"
        for name, found in phases.items()
    ]
    return "; ".join([rates, *parts])
