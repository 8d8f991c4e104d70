"""Runs one recipe in every way there is, one after another, and puts their tables side by side.

  python benchmarks/ways.py --arms cold_grpo,bridge               # workers, ranks, ray
  python benchmarks/ways.py --kill 40                             # each loses a process after 40 s
  python benchmarks/ways.py vllm --vllm-python .venv-vllm/bin/python --arms cold_grpo,bridge

`workers` is the run as anybody starts it, `ranks` --nproc 2, `ray` a cluster of two simulated nodes
of a core each, and `vllm` servers for rollouts and the teacher's scores. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("workers", "ranks", "ray", "vllm")
#: What tells the process to be killed from others of the run, by way.
_VICTIMS = {
    "workers": "headwater.workflow.worker",
    "ranks": "headwater.workflow.rank",
    "vllm": "vllm.entrypoints.openai.api_server",
}


@dataclass(frozen=True, slots=True)
class Result:
    """avg@k by (arm, evaluated model, evaluation set), and seconds by the clock."""

    values: dict[tuple[str, str, str], float]
    seconds: float
    killed: str


def main() -> None:
    """Run the ways asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--arms", help="only these, by name")
    parser.add_argument("--kill", type=float, metavar="SECONDS", help="kill a process of each run")
    parser.add_argument("--vllm-python", help="the interpreter that vLLM is installed for")
    parser.add_argument("--out", type=Path, default=Path("runs/ways"))
    asked = parser.parse_args()
    ways = asked.ways or [way for way in WAYS if way != "vllm" or asked.vllm_python]
    if unknown := sorted(set(ways) - set(WAYS)):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(WAYS)}")
    results = {}
    for way in ways:
        results[way] = _run(way, asked)
        print(f"{way}: {results[way].seconds:.0f} s{results[way].killed}", flush=True)
    print(table(results))


def _run(way: str, asked: argparse.Namespace) -> Result:
    """One run from nothing, in a folder of its own."""
    out = asked.out / way
    if out.exists():
        sys.exit(f"{out} is there already; remove it, or name another folder by --out")
    command = [sys.executable, "-m", "headwater", "run", asked.recipe, "--out", str(out), "-q"]
    command += ["--arms", asked.arms] if asked.arms else []
    command += ["--set", "compute.retries=3"]
    began = time.perf_counter()
    with _surroundings(way, asked.vllm_python) as (extra, cluster):
        run = subprocess.Popen([*command, *extra], stdout=subprocess.DEVNULL)
        killed = ""
        try:
            run.wait(asked.kill)
        except subprocess.TimeoutExpired:
            killed = f", {_kill(way, run.pid, cluster)}"
        if run.wait() != 0:
            sys.exit(f"{' '.join([*command, *extra])} ended with exit code {run.returncode}")
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    values = {(row["arm"], row["evaluates"], row["eval_set"]): row["avg_at_k"] for row in rows}
    return Result(values, time.perf_counter() - began, killed)


@contextmanager
def _surroundings(way: str, vllm_python: str | None) -> Iterator[tuple[list[str], Any]]:
    """What the command needs besides for a way, and the cluster that is there meanwhile."""
    if way == "ray":
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        try:
            yield ["--ray", cluster.address], cluster
        finally:
            cluster.shutdown()
        return
    extra = {"workers": [], "ranks": ["--nproc", "2"]}.get(way)
    if extra is None:
        engine = json.dumps({"kind": "vllm", "python": vllm_python or sys.executable})
        targets = json.dumps({"kind": "top_k", "k": 64})
        extra = [f"compute.{who}={engine}" for who in ("rollouts", "scoring")]
        extra += [f"stages.{stage}.targets={targets}" for stage in ("warmup", "opd")]
        extra = [word for value in extra for word in ("--set", value)]
    yield extra, None


def _kill(way: str, pid: int, cluster: Any) -> str:
    """End what a way can lose, and say what that was."""
    if way == "ray":
        node = next(iter(cluster.worker_nodes))
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        cluster.worker_nodes.discard(node)
        cluster.add_node(num_cpus=1)
        return "a node left and another came"
    for _ in range(600):  # a server, or a worker, is there for parts of the run only
        found = [one for one in _descendants(pid) if _VICTIMS[way] in _command(one)]
        if found:
            os.kill(found[-1], signal.SIGKILL)
            return f"one of {len(found)} processes killed ({_VICTIMS[way]})"
        time.sleep(0.1)
    return "nothing found to kill"


def _descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ")
    except OSError:
        return ""


def table(results: dict[str, Result]) -> str:
    """avg@k in per cent, a row an arm and a column a way; the last row is the clock."""
    first, *others = results.values()
    lines = ["| arm | " + " | ".join(results) + " |", "| --- |" + " --- |" * len(results)]
    for key in first.values:
        shown = [one.values.get(key) for one in (first, *others)]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in shown]
        lines.append(f"| {key[0]} ({key[1]}, {key[2]}) | " + " | ".join(cells) + " |")
    seconds = [f"{one.seconds:.0f} s" for one in results.values()]
    return "\n".join([*lines, "| by the clock | " + " | ".join(seconds) + " |"])


if __name__ == "__main__":
    main()
