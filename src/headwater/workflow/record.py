"""What a run folder says about itself, and what came of the run: all a report needs.

`run.json` is written before the first stage, so that a run that was stopped, at whatever
point, can be reported from its folder alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from headwater.config.claims import Contrast, Hypothesis, MapSpec
from headwater.errors import InputError
from headwater.plain_json import read_json_file
from headwater.storage import sealed, unsealed, write_whole
from headwater.workflow.confinement import is_folder_name
from headwater.workflow.graph import ArmPlan, BasePlan, Graph, StageNode
from headwater.workflow.study import Study

RUN_FILE = "run.json"
LEDGER_FILE = "ledger.sqlite"
_FORMAT = 1


@dataclass(frozen=True)
class RunRecord:
    """A run as planned: `run.json`."""

    name: str
    question: str | None
    titles: Mapping[str, str]
    seeds: tuple[int, ...]
    graph: Graph
    contrasts: tuple[Contrast, ...]
    pools: Mapping[str, int]
    contamination: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]
    machine: Mapping[str, Any]
    hypotheses: Mapping[str, Hypothesis] = field(default_factory=dict)
    map: MapSpec | None = None
    data: tuple[Mapping[str, Any], ...] = ()  # a source each: `recorded_data.ReadSource.facts`


def record_of(study: Study, threads: int, data: tuple[Mapping[str, Any], ...] = ()) -> RunRecord:
    """The record of a study about to be run with so many threads a stage, on this data."""
    recipe = study.recipe
    arms = {plan.arm for plan in study.graph.arms}
    return RunRecord(
        name=recipe.name,
        question=recipe.question,
        titles={name: recipe.arms[name].title or name for name in recipe.arms if name in arms},
        seeds=tuple(dict.fromkeys(plan.seed for plan in study.graph.arms)),
        graph=study.graph,
        contrasts=tuple(one for one in recipe.comparisons if _compared(one, arms)),
        pools=study.pool_sizes(),
        contamination=study.contamination,
        warnings=study.warnings,
        machine=_machine(threads, recipe.compute.deterministic),
        hypotheses={
            name: one
            for name, one in recipe.hypotheses.items()
            if all(_compared(claim, arms) for claim in one.claims)
        },
        map=recipe.map,
        data=data,
    )


def _compared(contrast: Contrast, arms: Collection[str]) -> bool:
    return {contrast.better, contrast.than} <= set(arms)


def write_record(record: RunRecord, run_dir: Path) -> None:
    """Write RUN/run.json, whole or not at all, with a seal over its content."""
    graph = record.graph
    plain = {name: value for name, value in vars(record).items() if name != "graph"}
    plain |= {
        "format": _FORMAT,
        "contrasts": [contrast.model_dump(mode="json") for contrast in record.contrasts],
        "hypotheses": {k: one.model_dump(mode="json") for k, one in record.hypotheses.items()},
        "map": None if record.map is None else record.map.model_dump(mode="json"),
        "nodes": [asdict(node) for node in graph.nodes.values()],
        "arms": [asdict(plan) for plan in graph.arms],
        "bases": [asdict(plan) for plan in graph.bases],
    }
    write_whole(run_dir / RUN_FILE, json.dumps(sealed(plain), indent=1) + "\n")


def read_record(run_dir: Path) -> RunRecord:
    """Read RUN/run.json. Raises InputError where there is none or it cannot be read."""
    path = run_dir / RUN_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing; give the folder of a run (headwater run --out)")
    try:
        plain = unsealed(read_json_file(path))
        if plain.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        nodes = [
            StageNode(**node | {"sources": tuple(node.get("sources", ()))})
            for node in plain.pop("nodes")
        ]
        _check_nodes(nodes)
        graph = Graph(
            {node.fingerprint: node for node in nodes},
            tuple(ArmPlan(**arm) for arm in plain.pop("arms")),
            tuple(BasePlan(**base) for base in plain.pop("bases")),
        )
        plain["contrasts"] = tuple(Contrast.model_validate(c) for c in plain["contrasts"])
        plain["hypotheses"] = {
            name: Hypothesis.model_validate(one)
            for name, one in plain.get("hypotheses", {}).items()
        }
        plain["map"] = MapSpec.model_validate(plain["map"]) if plain.get("map") else None
        plain |= {name: tuple(plain[name]) for name in ("seeds", "contamination", "warnings")}
        plain["data"] = tuple(plain.get("data", ()))  # absent from older records
        return RunRecord(graph=graph, **plain)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); run the recipe again to write it anew"
        ) from error


def _check_nodes(nodes: Sequence[StageNode]) -> None:
    """Raise ValueError unless every stage has a fingerprint and known parents before it."""
    known: set[str] = set()
    for node in nodes:
        if not is_folder_name(node.fingerprint):
            raise ValueError(f"{node.fingerprint!r} is no fingerprint")
        unknown = set(node.parents) - known
        if unknown:
            raise ValueError(f"{node.fingerprint} stands before {min(unknown)!r}, a parent of it")
        known.add(node.fingerprint)


def _machine(threads: int, deterministic: bool) -> dict[str, Any]:
    """Processor, threads of a stage, and versions of the libraries that decide numbers."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 1,
        "threads": threads,
        "deterministic": deterministic,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
