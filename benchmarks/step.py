"""Time and memory of one training step of headwater on fixed work; README.md has the method.

  python benchmarks/step.py grpo --model smollm2-135m --batch 16 --group 8 \\
      --prompt-len 64 --completion-len 64 --steps 4 --warmup 1

Prints one line `BENCH {json}`, after a line `ROOFLINE ...` for people.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import headwater
import roofline
from headwater.errors import HeadwaterError
from work import STAGES, Bench, Options


def peak_rss_mib() -> float:
    """The process's largest resident memory so far, as the peer's scripts read it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: Options) -> dict[str, Any]:
    """Run the steps and return the record that is printed."""
    bench = Bench(options)
    before = peak_rss_mib()
    result = bench.run()
    peak = peak_rss_mib()
    first = min(options.warmup, options.steps - 1)
    clocks = bench.clocks
    step_s, generate_s = _mean(clocks.step[first:]), _mean(clocks.generate[first:])
    record = _what(bench) | {
        "completion_tokens_last_step": int(bench.batch.lengths_N.sum()),
        "step_s": [round(seconds, 4) for seconds in clocks.step],
        "mean_step_s": round(step_s, 4),
        "mean_generate_s": round(generate_s, 4),
        "mean_train_s": round(step_s - generate_s, 4),
        "mean_loss_fwd_s": round(_mean(clocks.loss_forward[first:]), 4),
        "rss_before_train_mib": round(before, 1),
        "peak_rss_mib": round(peak, 1),
        "last_loss": result.loss,
        "last_log": {"grad_norm": result.grad_norm, **result.metrics},
    }
    if bench.device.type == "cuda":
        record["peak_device_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        record["device_name"] = torch.cuda.get_device_name(bench.device)
    if options.roofline:
        machine = roofline.measure(bench.dtype, bench.device)
        phases = dict(_phases(bench, machine, generate_s, step_s - generate_s))
        record["roofline"] = {"machine": asdict(machine)} | phases
        print(roofline.line(machine, phases))
    return record


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _what(bench: Bench) -> dict[str, Any]:
    options = bench.options
    return {
        "what": f"headwater_{options.kind}",
        "headwater": headwater.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": bench.threads,
        "device": bench.device.type,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "params_m": sum(p.numel() for p in bench.model.parameters()) / 1e6,
        "student_m": sum(p.numel() for p in bench.model.parameters()) / 1e6,
        "teacher_m": bench.teacher.parameters / 1e6 if bench.teacher else None,
        "vocab": bench.vocab_size,
        "batch": options.batch,
        "micro_batch": max(sum(len(g.rows) for g in micro) for micro in bench.micros),
        "group": options.group,
        "prompt_len": options.prompt_len,
        "completion_len": options.completion_len,
        "vary": options.vary,
        "bf16": int(bench.dtype == torch.bfloat16),
        "grad_ckpt": 0,
        "cont_batching": 0,
        "param_dtype_after": sorted({str(p.dtype) for p in bench.model.parameters()}),
        "master_dtype": sorted({str(p.dtype) for p in bench.updater.masters}),
    }


def _phases(
    bench: Bench, machine: roofline.Machine, sampling_s: float, training_s: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """The share of the machine each phase reached, on the lengths of the last step."""
    options, batch = bench.options, bench.batch
    prompts = [options.prompt_len] * bench.groups
    drawn = [[options.completion_len] * options.group] * bench.groups
    learned = [[len(r.response_ids) for r in group.rollouts] for group in batch.groups]
    element_bytes = bench.dtype.itemsize
    student = roofline.Model(bench.config, element_bytes)
    teacher = roofline.Model(bench.teacher_config, element_bytes) if bench.teacher else None
    sampled = teacher if teacher and options.kind == "warmup" else student
    sampling = sampled.sampling(roofline.Shape(prompts, drawn))
    yield "sampling", roofline.shares(machine, sampling, sampling_s)
    shape = roofline.Shape(prompts, learned)
    recorded = batch.recorded is not None and batch.recorded.was_read
    training = student.training(shape, recorded=recorded)
    if teacher:
        training += teacher.forward(shape)
    yield "training", roofline.shares(machine, training, training_s)


def parse(arguments: Sequence[str]) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("kind", choices=sorted(STAGES))
    parser.add_argument("--model", required=True, help="a model folder, smollm2-135m or tiny:NAME")
    parser.add_argument("--teacher", help="likewise, for opd and warmup")
    parser.add_argument("--batch", type=int, default=16, help="completions a step")
    parser.add_argument("--group", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--prompt-len", type=int, default=64, help="tokens")
    parser.add_argument("--completion-len", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="first steps left out of the means")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument(
        "--vary", type=int, choices=(0, 1), default=0, help="1: cut completions to ragged lengths"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch-tokens", type=int, help="default: the stage's")
    parser.add_argument(
        "--roofline", type=int, choices=(0, 1), default=1, help="1: also measure the machine"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"), help="for made models")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str]) -> int:
    """Print the record of the run; 2 for input that cannot be run."""
    try:
        record = measure(parse(arguments))
    except HeadwaterError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("BENCH " + json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
