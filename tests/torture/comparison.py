"""What must be the same of two runs of one recipe, whatever befell either of them.

Compared bit for bit: every published file (weights, tokenizers, rollouts, attempts, targets,
probes) and `recipe.yaml`. Compared as values: metrics.jsonl, manifests, closing accounts, run.json,
results.json, and every stage's logical spending in the ledger (labels and all counters).

Left out, because they say how long something took or what the machine did, not what was computed:

* `seconds`, `sampling_seconds`, `training_seconds`, `tokens_per_second`: wall time;
* `peak_memory_bytes`: depends on what the process did before;
* `physical`: spending with the work that was lost and done again;
* hash and size in the manifest, for files that hold one of these; all seals;
* `report.html`, `tables/`, `figures/`, `logs/`: made again from the above at every report;
* locks, and the ledger's file as such.

Nothing may be left in `staging/` or `checkpoints/`, and no half-removed folder anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headwater.ledger import Ledger
from headwater.workflow.graph import Graph

TIMES = frozenset(
    {
        "seconds",
        "sampling_seconds",
        "training_seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "physical",
    }
)
#: Published files that hold times: compared as values.
_TIMED = ("metrics.jsonl", "account.json")
_SEALS = frozenset({"seal"})


def findings(run_dir: Path, graph: Graph) -> dict[str, Any]:
    """Everything that is compared of a finished run, by name."""
    found: dict[str, Any] = {}
    artifacts = run_dir / "artifacts"
    for path in sorted(p for p in artifacts.rglob("*") if p.is_file()):
        found[str(path.relative_to(run_dir))] = _content(path)
    for name in ("recipe.yaml", "run.json", "results.json"):
        if (run_dir / name).is_file():
            found[name] = _content(run_dir / name)
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        for fingerprint, node in graph.nodes.items():
            spent = ledger.spending([fingerprint], "eval" if node.is_evaluation else "train")
            found[f"spent: {graph.describe(fingerprint)}"] = _untimed(spent.as_dict())
    found["left behind"] = [
        str(path.relative_to(run_dir))
        for folder in ("staging", "checkpoints", "artifacts")
        for path in (run_dir / folder).iterdir()
        if folder != "artifacts" or path.name not in graph.nodes
    ]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both, with the first difference of each."""
    return [
        f"{name}: {_shown(one.get(name))} and {_shown(other.get(name))}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "manifest.json":
        plain = _untimed(json.loads(path.read_text()), _SEALS)
        for name in _TIMED:
            plain["files"].pop(name, None)
        return plain
    if path.suffix == ".json" and path.name in (*_TIMED, "run.json", "results.json"):
        return _untimed(json.loads(path.read_text()), _SEALS)
    return path.read_bytes()


def _untimed(value: Any, more: frozenset[str] = frozenset()) -> Any:
    if isinstance(value, dict):
        left_out = TIMES | more
        return {k: _untimed(v, more) for k, v in value.items() if k not in left_out}
    return [_untimed(one, more) for one in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."
