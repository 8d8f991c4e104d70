"""Runs headwater and a peer in turn on the same fixed work and prints the ratios.

  python benchmarks/compare.py --peer-python PEER/bin/python --peer-dir FOLDER grpo opd

The peer is TRL, in an environment of its own, through the scripts trl_grpo.py and trl_opd.py of
--peer-dir. Without it only headwater runs. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from shapes import model_folder

PEER = "trl==1.16.0"
PEER_TORCH = "torch==2.13.0"
OURS = "headwater"
#: How the peer is set up: its best settings on this work, the same in float32 (which is faster
#: on a CPU whose matrix unit does not know bfloat16), and what it does when left alone.
PEER_SETTINGS = {
    "tuned": ("--grad-ckpt", "0"),
    "float32": ("--grad-ckpt", "0", "--bf16", "0"),
    "defaults": ("--grad-ckpt", "1"),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Fixed work, named. Batch counts completions; lengths are tokens.

    dtype `auto`: ours as a stage would choose on this machine, the peer's bfloat16.
    """

    kind: str
    model: str = "smollm2-135m"
    teacher: str | None = None
    batch: int = 16
    group: int = 8
    prompt_len: int = 64
    completion_len: int = 64
    vary: int = 0
    dtype: str = "auto"

    def arguments(self) -> list[str]:
        """What both sides' scripts are told."""
        lengths = ("--prompt-len", self.prompt_len, "--completion-len", self.completion_len)
        sizes = ("--batch", self.batch, "--group", self.group, *lengths, "--vary", self.vary)
        return [str(item) for item in sizes]


WORKLOADS = {
    "grpo": Workload("grpo"),
    "grpo-ragged": Workload("grpo", vary=1),
    "grpo-prompt": Workload("grpo", prompt_len=256),
    "opd": Workload("opd", teacher="smollm2-135m"),
    "tiny": Workload(
        "grpo", "tiny:student", batch=256, prompt_len=40, completion_len=32, dtype="float32"
    ),
    "tiny-opd": Workload(
        "opd",
        "tiny:student",
        teacher="tiny:teacher",
        batch=256,
        prompt_len=40,
        completion_len=32,
        dtype="float32",
    ),
}
DEFAULT_WORKLOADS = ("grpo", "grpo-ragged", "grpo-prompt", "opd", "tiny")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run. `peer_python` None: only ours."""

    peer_dir: Path
    peer_python: Path | None
    peer_settings: tuple[str, ...]
    steps: int
    warmup: int
    threads: int
    rounds: int
    workdir: Path


@dataclass(slots=True)
class Results:
    """Records of each side, in the order they were run."""

    of_side: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, side: str, record: dict[str, Any]) -> None:
        """Keep one record."""
        self.of_side.setdefault(side, []).append(record)

    def median(self, side: str, key: str) -> float:
        """Median of a number over the rounds."""
        return median(float(record[key]) for record in self.of_side[side])


def our_command(work: Workload, settings: Settings) -> list[str]:
    """Command line of headwater's step."""
    script = Path(__file__).with_name("step.py")
    teacher = [] if work.teacher is None else ["--teacher", work.teacher]
    return [
        *(sys.executable, str(script), work.kind, "--model", work.model, *teacher),
        *work.arguments(),
        *("--dtype", work.dtype, "--device", "cpu", "--workdir", str(settings.workdir)),
        *_steps(settings),
    ]


def peer_command(work: Workload, settings: Settings, name: str) -> list[str]:
    """Command line of the peer's script on the same model folders."""
    folder = model_folder(work.model, settings.workdir)
    script = settings.peer_dir / ("trl_grpo.py" if work.kind == "grpo" else "trl_opd.py")
    models = ["--model-dir", str(folder)]
    if work.teacher is not None:
        models += ["--teacher-dir", str(model_folder(work.teacher, settings.workdir, seed=1))]
    return [
        *(str(settings.peer_python), str(script), *models, *work.arguments()),
        *("--bf16", str(int(work.dtype != "float32")), *PEER_SETTINGS[name]),
        *_steps(settings),
    ]


def _steps(settings: Settings) -> list[str]:
    numbers = ("--steps", settings.steps, "--warmup", settings.warmup, "--threads")
    return [str(item) for item in (*numbers, settings.threads)]


def run(command: Sequence[str], threads: int) -> dict[str, Any]:
    """The record a script prints as `BENCH {json}`.

    Raises RuntimeError with the end of what it wrote when it fails or prints none.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("BENCH ")]
    if done.returncode != 0 or not found:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(
            f"{' '.join(command)}\nexit code {done.returncode}, expected 0 and a line "
            f"`BENCH {{json}}`; it ended with:\n{end}"
        )
    record: dict[str, Any] = json.loads(found[-1].removeprefix("BENCH "))
    return record


def sides(work: Workload, settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each side, ours first."""
    yield OURS, our_command(work, settings)
    if settings.peer_python is not None:
        for name in settings.peer_settings:
            yield f"trl {name}", peer_command(work, settings, name)


def missing_peer(settings: Settings) -> str | None:
    """Why the peer cannot run and what to do about it; None when it can."""
    python = settings.peer_python
    if python is None or not python.is_file():
        folder = settings.workdir / "peer"
        return (
            f"the peer is missing (no {python}): it needs an environment of its own with {PEER}; "
            f"`python3 -m venv {folder} && {folder}/bin/pip install {PEER_TORCH} && "
            f"{folder}/bin/pip install {PEER}`, then --peer-python {folder}/bin/python"
        )
    for script in ("trl_grpo.py", "trl_opd.py"):
        if not (settings.peer_dir / script).is_file():
            return f"{settings.peer_dir} has no {script}; give the folder that does as --peer-dir"
    return None


def machine() -> dict[str, Any]:
    """What ran it, and how busy it was when it began."""
    names = [
        line.partition(":")[2].strip()
        for line in _text(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def table(name: str, results: Results) -> Table:
    """Seconds, memory and what each side takes of them, as multiples of ours."""
    found = Table(title=f"{name}: x is the multiple of ours")
    for heading in ("side", "step s", "sampling s", "training s", "peak MiB"):
        found.add_column(heading, justify="left" if heading == "side" else "right")
    for heading in ("time", "sampling", "training", "memory"):
        found.add_column(f"x {heading}", justify="right")
    keys = ("mean_step_s", "mean_generate_s", "mean_train_s", "peak_rss_mib")
    ours = [results.median(OURS, key) for key in keys]
    for side in results.of_side:
        values = [results.median(side, key) for key in keys]
        ratios = [theirs / mine for theirs, mine in zip(values, ours, strict=True)]
        seconds = [f"{value:.3f}" for value in values[:3]]
        times = [f"{ratio:.2f}" for ratio in ratios]
        found.add_row(side, *seconds, f"{values[3]:.0f}", *times)
    return found


def check_same_work(results: Results) -> None:
    """Raises RuntimeError when the sides did not train on the same number of tokens."""
    tokens = {
        side: sorted({int(record["completion_tokens_last_step"]) for record in records})
        for side, records in results.of_side.items()
    }
    if len({tuple(found) for found in tokens.values()}) > 1:
        raise RuntimeError(
            f"completion tokens of the last step differ: {tokens}; expected the same work on all "
            "sides, so these times cannot be compared"
        )


def compare(
    names: Sequence[str], settings: Settings, out: Path, console: Console
) -> dict[str, Results]:
    """Run every workload `rounds` times, sides in turn; append a JSON line per run to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        results = Results()
        work = WORKLOADS[name]
        for round_ in range(settings.rounds):
            for side, command in sides(work, settings):
                where = machine()
                record = run(command, settings.threads)
                results.add(side, record)
                console.print(
                    f"{name}, round {round_ + 1} of {settings.rounds}, {side}: "
                    f"{record['mean_step_s']:.3f} s a step, {record['peak_rss_mib']:.0f} MiB, "
                    f"{'bfloat16' if record['bf16'] else 'float32'}"
                )
                row = {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "workload": name,
                    "side": side,
                    "round": round_,
                    "machine": where,
                    "result": record,
                }
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        check_same_work(results)
        console.print(table(name, results))
        found[name] = results
    return found


def parse(arguments: Sequence[str]) -> tuple[list[str], Settings, Path]:
    """Workloads, settings and the file to append to, from a command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--peer-dir", type=Path, default=Path("../shared/bench"))
    parser.add_argument("--peer-python", type=Path, help="default: WORKDIR/peer/bin/python")
    parser.add_argument(
        "--peer-settings", nargs="+", choices=list(PEER_SETTINGS), default=["tuned"]
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="first steps left out of the means")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1, help="medians over this many")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, help="default: WORKDIR/compare.jsonl")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; choose from {', '.join(WORKLOADS)}")
    settings = Settings(
        peer_dir=found.peer_dir,
        peer_python=found.peer_python or found.workdir / "peer" / "bin" / "python",
        peer_settings=tuple(found.peer_settings),
        steps=found.steps,
        warmup=found.warmup,
        threads=found.threads,
        rounds=found.rounds,
        workdir=found.workdir,
    )
    names = found.workloads or list(DEFAULT_WORKLOADS)
    return names, settings, found.out or found.workdir / "compare.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Compare; 1 when a side fails."""
    names, settings, out = parse(arguments)
    console = Console(highlight=False, soft_wrap=True, width=max(100, Console().width))
    reason = missing_peer(settings)
    if reason is not None:
        console.print(f"only {OURS} runs: {reason}", markup=False)
        settings = replace(settings, peer_python=None)
    busy = machine()["load"]
    if busy > 0.5:
        console.print(f"load average {busy}: expected an idle machine; times below are not clean")
    try:
        compare(names, settings, out, console)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
