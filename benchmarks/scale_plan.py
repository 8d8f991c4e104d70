"""Simulated scaling of one study's GRPO stage: ranks, what its time goes to, what saturates first.

  python benchmarks/scale_plan.py --labels 1000000 --devices 8 64 512

Nothing is run but the planner: `headwater.workflow.devices` on the settings below. Prints the
Markdown tables of docs/scaling.md, and with --write puts them there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headwater import api
from headwater.config.compute import VLLM, Compute
from headwater.models.size import ModelSize
from headwater.report.quantities import count, hours
from headwater.workflow.calibration import GPU, calibrated
from headwater.workflow.cost import Machine
from headwater.workflow.devices import DeviceNeed, Offer, device_need
from headwater.workflow.estimate import estimate, model_sizes
from headwater.workflow.prepare import prepare_study
from headwater.workflow.stage_seconds import ledger_writes
from headwater.workflow.stage_work import StageWork

_DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
_BEGIN, _END = "<!-- tables: begin", "<!-- tables: end -->"
#: Part of the time -> what saturates where it is the largest of those that more ranks do not help.
_LIMITS = {
    "communication": "communication",
    "verifying": "the verifier",
    "pushing": "pushing weights",
    "tail": "the longest response",
    "idle": "too few prompts a step",
    "other": "the main rank (updates, ledger, saving)",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run the stage on so many devices."""

    name: str
    prompts_per_rank: int | None = None  # None: as the recipe has it
    servers: bool = False
    verifier_workers: int = 1
    recompute: bool = True


SETTINGS = (
    Setting("as the recipe has it"),
    Setting("2 prompts a rank", prompts_per_rank=2),
    Setting("16 prompts a rank", prompts_per_rank=16),
    Setting("16 prompts a rank, 16 verifier workers", prompts_per_rank=16, verifier_workers=16),
    Setting("16 a rank, half of the devices serve", 16, servers=True, verifier_workers=16),
)


def grpo_work(prompts: int, labels: int, group: int, mean: int, longest: int) -> StageWork:
    """GRPO once over all labels, `prompts` a step."""
    steps = max(1, labels // prompts)
    rollouts = steps * prompts * group
    return StageWork(
        updates=steps,
        trained_tokens=rollouts * mean,
        rollouts=rollouts,
        rollout_batches=steps,
        max_new_tokens=longest,
        mean_new_tokens=mean,
        referenced=True,
        labels=labels,
        verifier_calls=rollouts,
        prompts=steps * prompts,
        micro_batch_tokens=max(16_384, group * longest),
        groups_per_update=prompts,
        group_tokens=group * longest,
        checkpoint_seconds=30.0,
    )


def stage_on(
    devices: int, setting: Setting, size: ModelSize, options: argparse.Namespace, offer: Offer
) -> tuple[StageWork, DeviceNeed]:
    """The stage on all of the devices: as ranks, or half as ranks and half as servers."""
    ranks = devices // 2 if setting.servers else devices
    prompts = options.prompts_per_step
    if setting.prompts_per_rank is not None:
        prompts = setting.prompts_per_rank * ranks
    work = grpo_work(prompts, options.labels, options.group, options.mean, options.longest)
    compute = Compute(ranks=ranks, activation_checkpointing=setting.recompute)
    if setting.servers:
        urls = tuple(f"http://server-{number}:8000" for number in range(devices - ranks))
        compute = compute.model_copy(update={"rollouts": VLLM(urls=urls)})
    offer = replace(offer, compute=compute, verifier_workers=setting.verifier_workers)
    return work, device_need(work, size, size, offer)


def rows(options: argparse.Namespace, offer: Offer, size: ModelSize) -> Iterator[str]:
    """Markdown: a row for each number of devices and setting."""
    yield (
        "| devices | setting | prompts a step | fits | tok/s | h | GPU-h | sample | train | "
        "comm. | verify | push | other | tail | idle | saturates first |"
    )
    yield "| --- " * 2 + "| ---: " * 13 + "| --- |"
    for devices in options.devices:
        for setting in SETTINGS:
            work, need = stage_on(devices, setting, size, options, offer)
            shares = need.seconds.shares()
            first = max(_LIMITS, key=lambda part: shares[part])
            shown = ("sampling", "training", "communication", "verifying", "pushing", "other")
            shares["training"] += shares["scoring"]
            cells = [f"{100 * shares[part]:.0f}" for part in (*shown, "tail", "idle")]
            yield (
                f"| {devices} | {setting.name} | {work.groups_per_update:,} | "
                f"{'yes' if need.fits else 'no'} | {count(need.tokens_per_second)} | "
                f"{hours(need.seconds.total / 3600)} | {hours(need.device_hours)} | "
                + " | ".join(cells)
                + f" | {_LIMITS[first]}: {100 * shares[first]:.0f} % |"
            )


def serial_parts(options: argparse.Namespace, offer: Offer) -> Iterator[str]:
    """What one process does for all, however many devices there are."""
    work = grpo_work(options.prompts_per_step, options.labels, options.group, options.mean, 1)
    rates = offer.rates
    writes = ledger_writes(work)
    yield "| done once, by one process | how often | each | hours |"
    yield "| --- | ---: | ---: | ---: |"
    for name, times, each in (
        ("ledger transactions", writes, rates.ledger_seconds),
        ("answers graded by one worker", work.verifier_calls, rates.verifier_seconds),
        ("updates besides their arithmetic", work.updates, rates.update_seconds),
        ("rollouts told to all ranks (tokens)", work.generated_tokens, rates.exchange_seconds),
    ):
        yield f"| {name} | {count(times)} | {each:.2g} s | {hours(times * each / 3600)} |"


def study_rows(options: argparse.Namespace, offer: Offer) -> Iterator[str]:
    """The whole study, independent stages side by side."""
    study = prepare_study(
        api.load(options.recipe, ["compute.activation_checkpointing=true"], options.profile),
        planning=True,
    )
    yield "| devices | hours | device hours | busy | longest path alone, h |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for devices in options.devices:
        there = replace(offer, count=devices, compute=study.recipe.compute)
        plan = estimate(study, Machine("cuda", 1, 1, there), mean_response=options.mean)
        found = plan.cluster.schedule
        yield (
            f"| {devices} | {hours(found.seconds / 3600)} | {hours(plan.device_hours)} | "
            f"{found.busy_share:.0%} | {hours(found.longest_path_seconds / 3600)} |"
        )


def report(options: argparse.Namespace) -> str:
    """All tables."""
    rates = GPU if options.calibration is None else calibrated(options.calibration, GPU)
    offer = Offer(rates=rates, memory_bytes=int(options.gpu_memory * 2**30))
    recipe = api.load(options.recipe, (), options.profile)
    size = model_sizes(recipe)[options.model]
    if size is None:
        raise SystemExit(f"size of {options.model} is not known; name a model of {options.recipe}")
    parts = [
        f"GRPO on `{options.model}` of `{options.recipe}` ({size.parameters / 1e9:.1f}B "
        f"parameters), once over {options.labels:,} problems, groups of {options.group}, of "
        f"{options.mean:,} tokens on average and {options.longest:,} at most, with a KL penalty; "
        f"layers are recomputed; {options.gpu_memory:g}-GiB devices, eight a node. Columns from "
        "`sample` to `idle` are per cent of the time.",
        "\n".join(rows(options, offer, size)),
        "What does not shrink with devices, at the recipe's own prompts a step:",
        "\n".join(serial_parts(options, offer)),
        f"The whole study `{options.recipe}`, profile `{options.profile}`:",
        "\n".join(study_rows(options, offer)),
    ]
    return "\n\n".join(parts)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--recipe", default="qwen3-1.7b")
    parser.add_argument("--profile", default="fast")
    parser.add_argument("--model", default="teacher", help="a model of the recipe")
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--mean", type=int, default=2_000, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=4_096)
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of one device")
    parser.add_argument("--calibration", type=Path, help="a file of benchmarks/calibrate.py")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    tables = report(options)
    if not options.write:
        print(tables)
        return
    text = _DOCUMENT.read_text(encoding="utf-8")
    head, begin, rest = text.partition(_BEGIN)
    mark, _, _ = rest.partition("\n")
    _, end, tail = rest.partition(_END)
    _DOCUMENT.write_text(f"{head}{begin}{mark}\n\n{tables}\n\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
