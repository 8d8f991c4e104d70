"""Which ready stage goes first: the one with the longest way still to go behind it."""

from __future__ import annotations

from collections.abc import Mapping

from headwater.workflow.graph import Graph, StageNode


def urgency(graph: Graph) -> Mapping[str, float]:
    """Fingerprint -> rough work on the longest path that begins with this stage."""
    found: dict[str, float] = {}
    for fingerprint in reversed(tuple(graph.nodes)):
        behind = max((found[child] for child in graph.children[fingerprint]), default=0.0)
        found[fingerprint] = behind + _work(graph.nodes[fingerprint])
    return found


def _work(node: StageNode) -> float:
    """Sequences a stage samples or trains on; only the order of magnitude matters."""
    config = node.config
    match node.kind:
        case "grpo" | "opd" | "mixed":
            return 1.0 + 3.0 * config["steps"] * config["prompts_per_step"] * config["group_size"]
        case "pretrain":
            return 1.0 + config["steps"] * config["batch_size"]
        case "sft" | "warmup" | "sample_sft":
            return 1.0 + (config["steps"] or 100 * config["epochs"]) * config["batch_size"]
        case "evaluate":
            return 1.0 + 200.0 * config["attempts"]
        case "outside_rollouts":
            return 1000.0  # a server's or a disk's time
        case "probe":
            return 1.0 + config["prompts"] * config["rollouts_per_prompt"]
        case _:
            return 1.0
