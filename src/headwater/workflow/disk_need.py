"""What the stages of a study that are still to do leave on the disk, and need while they run.

Upper bounds from settings and sizes alone: every trained model is kept, in float32, so that any
stage can be read again, and a run of many arms on a real model fills a disk with them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from headwater.models.size import ModelSize
from headwater.storage import free_bytes, in_binary_units
from headwater.workflow.estimate import model_sizes
from headwater.workflow.graph import EVALUATES, StageNode
from headwater.workflow.stage_work import StageWork, work_of
from headwater.workflow.study import Study

_VALUE_BYTES = 4
#: A checkpoint's masters and two moments, and the older checkpoint that it replaces.
_CHECKPOINT_BYTES = 2 * 3 * _VALUE_BYTES
#: Of one kept token of a distribution's top: its id and its log-probability.
_TOP_BYTES = 8
_WRITES_NO_MODEL = EVALUATES | {"teacher_rollouts", "outside_rollouts"}


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """kept: bytes of artifacts still to be made; besides: bytes of checkpoints at a time."""

    kept: int
    besides: int

    @property
    def total(self) -> int:
        """The most that is used at once, at the end of the run."""
        return self.kept + self.besides

    def warning(self, out_dir: Path) -> str | None:
        """What to say where the disk of `out_dir` has less than that; None where it has enough."""
        free = free_bytes(out_dir)
        if free is None or free >= self.total:
            return None
        return (
            f"the run may need {in_binary_units(self.total)} on disk ({in_binary_units(self.kept)} "
            f"of models and rollouts that it keeps), and {in_binary_units(free)} are free at "
            f"{out_dir}; free some, or name a folder on a larger disk by --out. A run that fills "
            "the disk stops, loses nothing, and is continued by the same command"
        )


def published(study: Study, out_dir: Path) -> frozenset[str]:
    """Stages of the study whose artifacts a run folder has."""
    return frozenset(name for name in study.graph.nodes if (out_dir / "artifacts" / name).is_dir())


def disk_need(study: Study, cached: Collection[str], processes: int) -> DiskNeed:
    """Of the stages that are not `cached`. Models of unknown size count as nothing."""
    sizes = model_sizes(study.recipe)
    waiting = [node for name, node in study.graph.nodes.items() if name not in cached]
    kept = sum(_artifact_bytes(study, node, sizes) for node in waiting)
    trained = [_parameters(node, sizes) for node in waiting if node.kind not in _WRITES_NO_MODEL]
    largest = sorted(trained)[-max(1, processes) :]
    return DiskNeed(kept, sum(largest) * _CHECKPOINT_BYTES)


def _parameters(node: StageNode, sizes: Mapping[str, ModelSize | None]) -> int:
    size = sizes.get(node.model_name)
    return 0 if size is None else size.parameters


def _artifact_bytes(study: Study, node: StageNode, sizes: Mapping[str, ModelSize | None]) -> int:
    if node.kind not in _WRITES_NO_MODEL:
        return _parameters(node, sizes) * _VALUE_BYTES
    size = sizes.get(node.model_name)
    if node.kind != "teacher_rollouts" or size is None:
        return 0  # text and numbers
    return _targets_bytes(node, work_of(study, node, None), size)


def _targets_bytes(node: StageNode, work: StageWork, size: ModelSize) -> int:
    """The teacher's distributions: hidden states and head, or the top of each."""
    tokens = work.rollouts * work.mean_new_tokens
    targets = node.config["targets"]
    if targets is None:  # for SFT on what the teacher said
        return 0
    if targets["kind"] == "full":
        return (tokens + size.vocabulary) * size.hidden * _VALUE_BYTES
    return tokens * int(targets.get("k", 1)) * _TOP_BYTES
