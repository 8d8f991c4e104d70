"""The stage graph of a study: its distinct stages, their order, and what each arm is made of.

Pure and free of torch; `planner` makes it from a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from headwater.config.base import Settings
from headwater.config.evaluation import Evaluation, EvaluationSampling
from headwater.config.recipe import Diagnostics, ModelSpec, Recipe
from headwater.config.stages import (
    READS_LABELS,
    STAGE_MODELS,
    OutsideRolloutsStage,
    Sampling,
    TeacherRolloutsStage,
)

#: Raised by whoever changes the numbers a stage gives; artifacts of older versions are not reused.
STAGE_VERSIONS: dict[str, int] = {
    "source": 1,
    "pretrain": 2,
    "sft": 2,
    "grpo": 5,
    "teacher_rollouts": 3,
    "outside_rollouts": 1,
    "warmup": 2,
    "sample_sft": 2,
    "opd": 4,
    "mixed": 3,
    "evaluate": 4,
    "probe": 2,
}

#: Settings record of every stage kind.
CONFIG_MODELS: dict[str, type[Settings]] = {
    **STAGE_MODELS,
    "source": ModelSpec,
    "teacher_rollouts": TeacherRolloutsStage,
    "outside_rollouts": OutsideRolloutsStage,
    "evaluate": Evaluation,
    "probe": Diagnostics,
}

#: What a probe leaves in its artifact.
PROBE_FILE = "probe.json"
#: Kinds that train nothing and are charged to evaluation.
EVALUATES = frozenset({"evaluate", "probe"})
#: Kinds that are given a label vault.
NEEDS_VAULT = READS_LABELS | {"evaluate"}
#: Kinds whose result depends on the verifier.
GRADES = frozenset({"grpo", "mixed", "evaluate"})
Role = Literal["base", "teacher", "student"]


@dataclass(frozen=True, slots=True)
class StageNode:
    """One distinct stage. `model`, `teacher`, `rollouts` and `base`, which adapters refer to,
    are fingerprints of its parents.

    teachers: source of problems -> the fingerprint of what teaches them in the place of `teacher`
    or, where the stage has them, of `rollouts`. sources: of its pool, the only ones it reads.
    """

    fingerprint: str
    kind: str
    config: Mapping[str, Any]  # plain values; `settings` gives the record
    seed: int
    stream: str
    role: Role
    model_name: str
    pool: str | None = None
    eval_set: str | None = None
    model: str | None = None
    teacher: str | None = None
    rollouts: str | None = None
    base: str | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
    sources: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parents(self) -> tuple[str, ...]:
        """Fingerprints this stage reads, without repeats."""
        read = (self.model, self.teacher, self.rollouts, self.base, *self.teachers.values())
        return tuple(dict.fromkeys(parent for parent in read if parent))

    @property
    def asked(self) -> tuple[str, ...]:
        """Fingerprints of the models that it asks itself what they think, without repeats."""
        others = () if self.rollouts else self.teachers.values()
        return tuple(dict.fromkeys(one for one in (self.teacher, *others) if one))

    @property
    def read_rollouts(self) -> tuple[str, ...]:
        """Fingerprints of the rollouts that it trains on, without repeats."""
        others = self.teachers.values() if self.rollouts else ()
        return tuple(dict.fromkeys(one for one in (self.rollouts, *others) if one))

    @property
    def is_evaluation(self) -> bool:
        """Whether its spending goes to the evaluation account."""
        return self.kind in EVALUATES

    def settings(self) -> Settings:
        """The stage's settings as their frozen record."""
        return CONFIG_MODELS[self.kind].model_validate(dict(self.config))


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """One arm at one seed: its two endpoints and the evaluations of each, by evaluation set.

    probes: how far the student is from its teacher, at "start" and after each transfer stage.
    teachers: source -> fingerprint of another teacher, of the problems of that source.
    """

    arm: str
    seed: int
    evaluates: Role
    teacher: str | None  # fingerprint of the arm's teacher as the student meets it
    student: str | None
    teacher_evaluations: Mapping[str, str]
    student_evaluations: Mapping[str, str]
    probes: Mapping[str, str] = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Fingerprint of the model this arm's row is about."""
        endpoint = self.teacher if self.evaluates == "teacher" else self.student
        assert endpoint is not None
        return endpoint

    @property
    def evaluations(self) -> Mapping[str, str]:
        """Evaluation set -> fingerprint, for this arm's row."""
        teacher = self.evaluates == "teacher"
        return self.teacher_evaluations if teacher else self.student_evaluations


@dataclass(frozen=True, slots=True)
class BasePlan:
    """The evaluations of a base model (prepared, before any arm's stage) at one seed."""

    model_name: str
    seed: int
    model: str
    evaluations: Mapping[str, str]


@dataclass(frozen=True)
class Graph:
    """Distinct stages, parents before children, and what each arm is made of."""

    nodes: Mapping[str, StageNode]
    arms: tuple[ArmPlan, ...]
    bases: tuple[BasePlan, ...] = ()

    @cached_property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """Fingerprint -> fingerprints of the stages that read it."""
        found: dict[str, list[str]] = {fingerprint: [] for fingerprint in self.nodes}
        for node in self.nodes.values():
            for parent in node.parents:
                found[parent].append(node.fingerprint)
        return {fingerprint: tuple(children) for fingerprint, children in found.items()}

    @cached_property
    def users(self) -> Mapping[str, tuple[str, ...]]:
        """Fingerprint -> names of the arms that use it (evaluations included)."""
        found: dict[str, dict[str, None]] = {fingerprint: {} for fingerprint in self.nodes}
        for plan in self.arms:
            evaluations = (*plan.teacher_evaluations.values(), *plan.student_evaluations.values())
            ends = [end for end in (plan.teacher, plan.student) if end]
            for fingerprint in self.closure([*ends, *evaluations, *plan.probes.values()]):
                found[fingerprint][plan.arm] = None
        return {fingerprint: tuple(arms) for fingerprint, arms in found.items()}

    @cached_property
    def _places(self) -> Mapping[str, int]:
        """Fingerprint -> its place among the nodes, parents before children."""
        return {fingerprint: place for place, fingerprint in enumerate(self.nodes)}

    @cached_property
    def seeds(self) -> frozenset[int]:
        """Seeds of the arms."""
        return frozenset(plan.seed for plan in self.arms)

    def closure(self, fingerprints: Iterable[str]) -> tuple[str, ...]:
        """These stages and everything they are made from, parents first."""
        seen: set[str] = set()
        waiting = list(fingerprints)
        while waiting:
            fingerprint = waiting.pop()
            if fingerprint not in seen:
                seen.add(fingerprint)
                waiting += self.nodes[fingerprint].parents
        return tuple(sorted(seen, key=self._places.__getitem__))

    def root(self, fingerprint: str) -> str:
        """The source a model descends from; a pruned one has its parent's tokenizer."""
        while (parent := self.nodes[fingerprint].model) is not None:
            fingerprint = parent
        return fingerprint

    def arm_stages(self, plan: ArmPlan) -> tuple[str, ...]:
        """Every training stage an arm's row used, shared ones included, parents first."""
        return self.closure([plan.endpoint])

    def describe(self, fingerprint: str) -> str:
        """How messages name a stage: kind, pool, arms and seed."""
        node = self.nodes[fingerprint]
        where = node.pool or node.eval_set
        arms = ", ".join(self.users[fingerprint]) or "base models"
        what = f"{node.kind} on {where}" if where else f"{node.kind} of {node.model_name}"
        return f"{what} ({arms}; seed {node.seed}; stage {fingerprint})"


def sampling_of(node: StageNode, recipe: Recipe) -> Sampling:
    """The sampling settings a stage draws with; the recipe's where it draws nothing."""
    if not node.sampling:
        return recipe.sampling
    record = EvaluationSampling if node.kind == "evaluate" else Sampling
    return record.model_validate(dict(node.sampling))
