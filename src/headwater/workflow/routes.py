"""An arm's route through the graph: which stages made its teacher, its student, and from what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headwater.config.stages import READS_TEACHER
from headwater.workflow.graph import ArmPlan, Graph, StageNode


@dataclass(frozen=True, slots=True)
class Route:
    """Stages after the bases, in order. `teacher` is empty for a raw teacher or none.

    teacher_base: the teacher's base model, or the name of one from outside; None for an arm that
    learns from no teacher. base: the
    base of the model evaluated. own: its stages, of which `transfers` read the teacher. teachers:
    source -> stages and base of another teacher, of the problems of that source.
    """

    base: str
    own: tuple[StageNode, ...]
    teacher_base: str | None
    teacher: tuple[StageNode, ...]
    teachers: Mapping[str, tuple[tuple[StageNode, ...], str]] = field(default_factory=dict)

    @property
    def taught_by(self) -> tuple[StageNode, ...]:
        """The stages of all teachers, each once."""
        stages = [*self.teacher, *(node for others, _ in self.teachers.values() for node in others)]
        return tuple({node.fingerprint: node for node in stages}.values())

    @property
    def teacher_words(self) -> str | None:
        """How tables call the teachers: the default's base, then a source and who teaches it."""
        if not self.teachers:
            return self.teacher_base
        others = [f"{source}: {words_of(*one)}" for source, one in self.teachers.items()]
        return ", ".join([str(self.teacher_base), *others])

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
    teachers: Mapping[str, tuple[tuple[StageNode, ...], str]] = {}
    outside = (graph.nodes[node.rollouts] for node in own if node.rollouts is not None)
    teacher_base = next((one.model_name for one in outside if one.teacher is None), None)
    if plan.teacher is not None and any(node.kind in READS_TEACHER for node in own):
        teacher, teacher_base = line(graph, plan.teacher)
        teachers = {source: line(graph, end) for source, end in plan.teachers.items()}
    return Route(base, own, teacher_base, teacher, teachers)


def line(graph: Graph, end: str) -> tuple[tuple[StageNode, ...], str]:
    """The stages that turned a base into `end`, first to last, and the base's name."""
    stages: list[StageNode] = []
    node = graph.nodes[end]
    while node.role != "base":
        stages.append(node)
        assert node.model is not None, "every stage after the bases begins with a model"
        node = graph.nodes[node.model]
    return tuple(reversed(stages)), node.model_name


def words_of(stages: tuple[StageNode, ...], base: str) -> str:
    """A model in words: its base, and the stages that trained it with their pools."""
    trained = [f"{node.kind}({node.pool})" for node in stages]
    return f"{base} after {', '.join(trained)}" if trained else base
