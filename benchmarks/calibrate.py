"""Measures the constants that `headwater plan` divides by, on the machine at hand.

  python benchmarks/calibrate.py --out here.json
  headwater plan quickstart --calibration here.json

Takes two to four minutes on a CPU core. README.md has the method. Constants of the network between
nodes, of vLLM servers and of a host's memory are not measured and stay what they were.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import answers
from collectives import measure_collectives
from compare import machine
from headwater.config.compute import Compute
from headwater.config.stages import GRPOStage
from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.memory import keep_freed_memory
from headwater.engine.packing import PackedGroup, pack
from headwater.engine.precision import resolve_device, resolve_dtype, set_threads
from headwater.engine.update import Updater
from headwater.ledger.ledger import Ledger
from headwater.losses.chunked_head import chunked_head_loss
from headwater.models.size import ModelSize, model_size
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.stages.supervised import cross_entropy_of
from headwater.types import FinishReason, Rollout
from headwater.verify.verifiers import make_verifier
from headwater.workflow.stage_seconds import forward_flops
from roofline import synchronize
from shapes import END_ID, FIRST_WORD_ID, config_of, model_folder

_GROUP, _PROMPT = 8, 32
#: AdamW's reads and writes, as the plan counts them; bytes a parameter.
_UPDATE_BYTES = 8 * 4


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a line over work: `intercept` + work / `rate`."""

    intercept: float
    rate: float

    @classmethod
    def through(cls, less: tuple[float, float], more: tuple[float, float]) -> Line:
        """The line through two (work, seconds); noise that turns it round is no rate."""
        slope = (more[1] - less[1]) / (more[0] - less[0])
        if slope <= 0:
            raise SystemExit(
                f"more work took less time ({less} and {more}): the machine is too busy to measure"
            )
        return cls(max(0.0, less[1] - slope * less[0]), 1.0 / slope)


class Model:
    """A model in training on random words, as a stage holds it."""

    def __init__(self, name: str, device: torch.device, workdir: Path) -> None:
        folder = model_folder(name, workdir)
        config = config_of(folder)
        self.size: ModelSize = model_size(config)
        self.device = device
        self.dtype = resolve_dtype(Compute(), device, self.size.hidden)
        self.model = load_engine_model(folder, torch.float32, device)
        self.updater = Updater(self.model, GRPOStage(), 1_000, self.dtype)
        self._rng = random.Random(0)

    def _words(self, count: int) -> tuple[int, ...]:
        draw = self._rng.randrange
        return tuple(draw(FIRST_WORD_ID, self.size.vocabulary) for _ in range(count))

    def training(self, groups: int, length: int, repeats: int) -> tuple[float, float]:
        """(FLOPs, seconds) of one micro-batch's forward and backward pass."""
        packed = [
            PackedGroup(
                self._words(_PROMPT),
                tuple(self._words(length) for _ in range(_GROUP)),
                tuple(range(group * _GROUP, (group + 1) * _GROUP)),
            )
            for group in range(groups)
        ]

        def run() -> None:
            tokens = pack(packed, dtype=self.dtype, device=self.device)
            hidden = hidden_at_targets(self.model, tokens)
            head = head_weight(self.model)
            chunked_head_loss(hidden, head, cross_entropy_of(tokens)).loss_sum.backward()
            for parameter in self.model.parameters():
                parameter.grad = None

        trained = groups * _GROUP * length  # as the plan counts: prompts are left out
        flops = 3.0 * trained * forward_flops(self.size, length)
        return flops, self._seconds(run, repeats)

    def scoring(self, groups: int, length: int, repeats: int) -> tuple[float, float]:
        """(FLOPs, seconds) of one forward pass without gradients."""
        words = [self._words(length) for _ in range(_GROUP)]
        packed = [PackedGroup(self._words(_PROMPT), tuple(words), tuple(range(_GROUP)))] * groups

        def run() -> None:
            with torch.no_grad():
                tokens = pack(packed, dtype=self.dtype, device=self.device)
                hidden = hidden_at_targets(self.model, tokens)
                chunked_head_loss(hidden, head_weight(self.model), cross_entropy_of(tokens))

        flops = groups * _GROUP * length * forward_flops(self.size, length)
        return flops, self._seconds(run, repeats)

    def decoding(self, rows: int, length: int, repeats: int) -> float:
        """Seconds of one step of decoding with so many rows, on average over a response."""
        sampler = InProcessSampler(
            self.model,
            SamplerSettings(
                temperature=1.0,
                max_new_tokens=length,
                end_ids=(END_ID,),
                vocab_size=self.size.vocabulary,
                forbid_end=True,
            ),
        )
        group = min(_GROUP, rows)
        requests = [
            SampleRequest(self._words(_PROMPT), tuple(range(first, first + group)))
            for first in range(0, rows, group)
        ]
        return self._seconds(lambda: sampler.sample(requests), repeats) / length

    def update(self, repeats: int) -> float:
        """Seconds of one AdamW step with its norm."""
        seconds = []
        for _ in range(repeats + 1):
            for parameter in self.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            seconds.append(self._once(lambda: self.updater._apply(0.0)))
        return min(seconds[1:])

    def _seconds(self, run: Callable[[], object], repeats: int) -> float:
        run()
        return min(self._once(run) for _ in range(repeats))

    def _once(self, run: Callable[[], object]) -> float:
        """Seconds on the device's clock: of one thread, its processor time, which other processes
        of a busy machine do not lengthen as they do the clock's."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        synchronize(self.device)
        started = clock()
        run()
        synchronize(self.device)
        return clock() - started


def of_a_small_model(model: Model, repeats: int) -> dict[str, float]:
    """Rates of an embedded model, whose steps are mostly launching."""
    layers = model.size.layers
    train = Line.through(model.training(1, 4, repeats), model.training(16, 48, repeats))
    few, many = (model.decoding(rows, 48, repeats) for rows in (8, 256))
    product = 2.0 * model.size.matmul_parameters
    step = Line.through((8 * product, few), (256 * product, many))
    return {
        "small_flops": train.rate,
        "train_layer_seconds": train.intercept / layers,
        "small_decoding_flops": step.rate,
        "decode_layer_seconds": step.intercept / layers,
        "update_seconds": model.update(repeats),
    }


def of_a_large_model(model: Model, repeats: int, decode_layer_seconds: float) -> dict[str, float]:
    """Rates of a model whose steps are mostly products, or reading its weights."""
    train = Line.through(model.training(1, 32, repeats), model.training(3, 32, repeats))
    score = Line.through(model.scoring(1, 32, repeats), model.scoring(3, 32, repeats))
    size, length = model.size, 8
    value_bytes = torch.finfo(model.dtype).bits // 8
    launching = size.layers * decode_layer_seconds
    few, many = model.decoding(8, length, repeats), model.decoding(128, length, repeats)
    read = size.matmul_parameters + 8 * length / 2 * size.kv_values_per_token
    return {
        "training_flops": train.rate,
        "scoring_flops": score.rate,
        "memory_bandwidth": read * value_bytes / max(few - launching, 1e-9),
        "decoding_flops": 2.0 * size.matmul_parameters * 128 / max(many - launching, 1e-9),
    }


def of_the_host(folder: Path) -> dict[str, float]:
    """Verifier, ledger and disk."""
    samples = answers.common(1_000, random.Random(0))
    pairs = [(sample.completion, sample.gold) for sample in samples]
    with closing(make_verifier("math", workers=1)) as verifier:
        verifier.grade(pairs[:20])
        started = time.perf_counter()
        verifier.grade(pairs)
        verifier_seconds = (time.perf_counter() - started) / len(pairs)
    with Ledger(folder / "ledger.sqlite") as ledger:
        account = ledger.account("stage")
        started = time.perf_counter()
        for _ in range(200):
            account.charge(updates=1)
        ledger_seconds = (time.perf_counter() - started) / 200
    return {
        "exchange_seconds": _exchange_seconds(),
        "verifier_seconds": verifier_seconds,
        "ledger_seconds": ledger_seconds,
        "disk_bandwidth": _disk_bandwidth(folder / "weights.bin"),
    }


def _exchange_seconds(rows: int = 64, length: int = 1024) -> float:
    """Seconds a token, made ready to be sent and read back as every rank does."""
    rng = random.Random(0)
    rollouts = [
        Rollout(
            prompt_ids=tuple(range(_PROMPT)),
            response_ids=tuple(rng.randrange(150_000) for _ in range(length)),
            sampler_logprobs=np.zeros(length, dtype=np.float32),
            finish_reason=FinishReason.STOP,
        )
        for _ in range(rows)
    ]
    started = time.process_time()
    pickle.loads(pickle.dumps(rollouts))  # noqa: S301 - made a line ago
    return (time.process_time() - started) / (rows * length)


def _disk_bandwidth(path: Path, size: int = 256 * 2**20) -> float:
    """Bytes a second, written, flushed and hashed."""

    block = os.urandom(2**20)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    seconds = time.perf_counter() - started
    path.unlink()
    return 2 * size / seconds  # each byte went out and in


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All constants that can be measured here."""
    keep_freed_memory()
    device = resolve_device(Compute(device=options.device))
    threads = set_threads(1 if device.type == "cpu" else None)
    where = machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else where["cpu"]
    about = (
        f"{name}, {threads} thread, torch {torch.__version__}; {options.small} and "
        f"{options.large}; load {where['load']} on {where['cores']} cores when it began"
    )
    found: dict[str, Any] = {"about": about}
    with tempfile.TemporaryDirectory() as folder:
        found |= of_the_host(Path(folder))
        say(found)
        small = of_a_small_model(Model(options.small, device, options.workdir), 5 * options.repeats)
        found |= small
        say(small)
        gc.collect()
        large = of_a_large_model(
            Model(options.large, device, options.workdir),
            options.repeats,
            small["decode_layer_seconds"],
        )
        found |= large
        say(large)
        if options.ranks > 1:
            between = measure_collectives(options.ranks, Path(folder))
            network = {
                "intra_bandwidth": between.bandwidth,
                "collective_seconds": between.latency,
            }
            found |= network
            say(network)
    return found


def say(constants: dict[str, Any]) -> None:
    """A line a constant, on stderr, as soon as it is known."""
    for name, value in constants.items():
        print(f"{name} = {value if isinstance(value, str) else f'{value:.4g}'}", file=sys.stderr)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file for `plan --calibration`")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--small", default="tiny:teacher", help="shape of a small model")
    parser.add_argument("--large", default="smollm2-135m", help="shape of a large model")
    parser.add_argument("--ranks", type=int, default=2, help="processes that gather; 1: none")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; the best counts")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    found = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{len(found) - 1} constants in {options.out}")


if __name__ == "__main__":
    main()
