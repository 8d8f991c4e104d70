"""What of its settings a stage's node has: defaults younger than artifacts left out, adapters
resolved, and what only one kind reads."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headwater.config.recipe import ModelSpec, Task
from headwater.errors import InputError
from headwater.models.source_names import SourceKind, describe_source
from headwater.workflow.graph import Graph, Role, StageNode


def settled(
    config: Mapping[str, Any], spec: ModelSpec, before: StageNode, role: Role
) -> tuple[dict[str, Any], str | None]:
    """A stage's settings as its fingerprint has them, and the fingerprint of its adapters' base.

    before: the stage whose model it trains. Adapters of the same settings are continued, so that
    the last of a chain are relative to the model that the first began with; the model's own are not
    those of its preparation. Without any the base is None. What is off and younger than artifacts
    is left out, for these are what they were without it.
    """
    younger = {"lora"} if config.get("overlap", True) else {"lora", "overlap"}
    rest = {key: value for key, value in config.items() if key not in younger}
    own = config["lora"]
    if own is None and spec.lora is not None and role != "base":
        own = spec.lora.model_dump(mode="json")
    if not own:
        return rest, None
    continues = before.base is not None and before.config["lora"] == own
    return rest | {"lora": own}, before.base if continues else before.fingerprint


def options_of(kind: str, base: StageNode | None, task: Task) -> dict[str, Any]:
    """What an adapter calls its base; what pretraining imitates, and must never meet.

    Raises InputError for pretraining without an embedded task.
    """
    if kind != "pretrain":
        return {} if base is None else {"base_name": _base_name(base)}
    if not task.train.startswith("task:"):
        raise InputError(
            f"task.train={task.train}: pretrain makes traces of an embedded task; set "
            "task.train to task:arithmetic, or start from a model that is already trained"
        )
    return {
        "train": task.train,
        "evals": [s for s in task.eval.values() if not s.startswith("pool:")],
    }


def _base_name(base: StageNode) -> str:
    """A hub id where it is one, or its place in the run folder."""
    if base.kind == "source":
        source = describe_source(base.config["source"])
        local = source.target.startswith((".", "/", "~")) or Path(source.target).is_dir()
        if source.kind is SourceKind.HF and not local:
            return source.target
    return f"artifacts/{base.fingerprint}/model"


def require_adapter_packages(graph: Graph) -> None:
    """Raise InputError where a stage trains through adapters and their packages are missing."""
    adapted = [node.config["lora"] for node in graph.nodes.values() if node.base is not None]
    needed = ["peft"] if adapted else []
    needed += ["bitsandbytes"] if any(lora["base"] == "nf4" for lora in adapted) else []
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"package {' and '.join(missing)} is not installed: expected it for stages with lora; "
            "pip install 'headwater[peft]', or remove lora"
        )
