"""Compares a plan's seconds with measured ones: steps of other models and lengths than calibrated.

  python benchmarks/calibrate.py --out here.json && python benchmarks/plan_check.py here.json

One thread of a CPU, by its processor time, so that a busy machine disturbs it less (not little:
caches and memory are shared). Prints a Markdown row a step.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from headwater.models.size import model_size
from headwater.workflow.calibration import CPU, calibrated
from headwater.workflow.device_memory import Placement, device_memory
from headwater.workflow.stage_seconds import Fleet, stage_seconds
from headwater.workflow.stage_work import StageWork
from work import Bench, Options

STEPS = (
    ("tiny:teacher", 256, 32),
    ("tiny:student", 256, 64),
    ("tiny:large", 128, 48),
    ("smollm2-135m?layers=12", 16, 32),
    ("smollm2-135m", 16, 48),
)


def step_work(batch: int, length: int) -> StageWork:
    """One GRPO step as `work.Bench` does it, without verifier and ledger."""
    return StageWork(
        updates=1,
        trained_tokens=batch * length,
        rollouts=batch,
        rollout_batches=1,
        max_new_tokens=length,
        mean_new_tokens=length,
        prompts=batch // 8,
        micro_batch_tokens=16_384,
        groups_per_update=batch // 8,
        group_tokens=8 * length,
    )


def compared(model: str, batch: int, length: int, options: argparse.Namespace) -> str:
    """The row of one step: planned and measured seconds of sampling and of training."""
    bench = Bench(
        Options(
            kind="grpo",
            model=model,
            batch=batch,
            prompt_len=16,
            completion_len=length,
            steps=options.steps + 1,
            threads=1,
            device="cpu",
            workdir=options.workdir,
        )
    )
    sampling, training = [], []
    for step in range(options.steps + 1):
        started = time.process_time()
        batch_drawn = bench._sample(step)
        drawn = time.process_time()
        bench.clocks.loss_forward.append(0.0)
        bench._train(batch_drawn)
        sampling.append(drawn - started)
        training.append(time.process_time() - drawn)
    size, work = model_size(bench.config), step_work(batch, length)
    placement = Placement(value_bytes=torch.finfo(bench.dtype).bits // 8, packs_weights=True)
    memory = device_memory(work, size, None, placement)
    rates = calibrated(options.calibration, CPU)
    planned = stage_seconds(work, size, None, placement, memory, Fleet(), rates)
    both = planned.sampling + planned.training + rates.update_seconds
    measured = min(sampling[1:]), min(training[1:])
    return (
        f"| {model}, {batch} responses of {length} | {planned.sampling:.2f} | {measured[0]:.2f} | "
        f"{planned.training:.2f} | {measured[1]:.2f} | {both / sum(measured):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("calibration", type=Path, help="a file of calibrate.py")
    parser.add_argument("--steps", type=int, default=3, help="of each; the best counts")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(sys.argv[1:])
    print("| step | sampling, planned s | measured | training, planned s | measured | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for model, batch, length in STEPS:
        print(compared(model, batch, length, options), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
