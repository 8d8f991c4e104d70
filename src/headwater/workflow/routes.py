"""An arm's route through the graph: which stages made its teacher, its student, and from what."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.config.stages import READS_TEACHER
from headwater.workflow.graph import ArmPlan, Graph, StageNode


@dataclass(frozen=True, slots=True)
class Route:
    """Stages after the bases, in order. `teacher` is empty for a raw teacher or none.

    teacher_base: the teacher's base model, or the name of one from outside; None for an arm that
    learns from no teacher. base: the
    base of the model evaluated. own: its stages, of which `transfers` read the teacher.
    """

    base: str
    own: tuple[StageNode, ...]
    teacher_base: str | None
    teacher: tuple[StageNode, ...]

    @property
    def transfers(self) -> tuple[StageNode, ...]:
        """Own stages that read the teacher."""
        return tuple(node for node in self.own if node.kind in READS_TEACHER)

    @property
    def others(self) -> tuple[StageNode, ...]:
        """Own stages that do not."""
        return tuple(node for node in self.own if node.kind not in READS_TEACHER)


def route_of(graph: Graph, plan: ArmPlan) -> Route:
    """The route of one arm at one seed."""
    own, base = line(graph, plan.endpoint)
    teacher: tuple[StageNode, ...] = ()
    outside = (graph.nodes[node.rollouts] for node in own if node.rollouts is not None)
    teacher_base = next((one.model_name for one in outside if one.teacher is None), None)
    if plan.teacher is not None and any(node.kind in READS_TEACHER for node in own):
        teacher, teacher_base = line(graph, plan.teacher)
    return Route(base, own, teacher_base, teacher)


def line(graph: Graph, end: str) -> tuple[tuple[StageNode, ...], str]:
    """The stages that turned a base into `end`, first to last, and the base's name."""
    stages: list[StageNode] = []
    node = graph.nodes[end]
    while node.role != "base":
        stages.append(node)
        assert node.model is not None, "every stage after the bases begins with a model"
        node = graph.nodes[node.model]
    return tuple(reversed(stages)), node.model_name
