"""Whether a contrast compares like with like.

Two arms may differ in their make-up as far as `differs_in` says, and in no setting that it does
not name. What is compared is the resolved configuration: the nodes of the graph, with every
default filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config.claims import Contrast
from headwater.config.recipe import Recipe
from headwater.config.stages import READS_LABELS
from headwater.errors import InputError
from headwater.near_names import near
from headwater.workflow.graph import ArmPlan, StageNode
from headwater.workflow.reader_rollouts import hashed_settings
from headwater.workflow.routes import Route, route_of, words_of
from headwater.workflow.stage_work import work_of
from headwater.workflow.study import Study

#: What a contrast may be about, and what each word covers.
ASPECTS: Mapping[str, str] = {
    "teacher": "the teacher's base model, its stages and the pools they read",
    "transfer": "which stages carry the teacher over to the student, and on which prompts",
    "student": "the student's own stages with labels, and the pools they read; where only one arm "
    "has a teacher, that is the teacher's doing and `teacher` covers it",
    "student_model": "the model whose row it is, before any arm's stage",
    "labels": "which labels are read in all",
    "updates": "how many updates a kind of stage makes in all",
}
_COUNTS = frozenset({"steps", "epochs", "updates_per_batch"})
#: Settings that follow from the transfer.
_FOLLOWS = {("teacher_rollouts", "targets"), ("outside_rollouts", "targets")}
#: What a setting of the cached rollouts is called where it is set.
_SHOWN_AS = {
    f"{kind}_rollouts.rollouts_per_prompt": "teacher_rollouts_per_prompt"
    for kind in ("teacher", "outside")
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that differs between two arms, and what in `differs_in` would allow it."""

    key: str
    better: Any
    than: Any
    allowed_by: tuple[str, ...]


def check_contrasts(study: Study) -> None:
    """Raises InputError with the key and both values of every difference not declared."""
    first = study.graph.arms[0].seed
    arms = {plan.arm: _Chains.of(study, plan) for plan in study.graph.arms if plan.seed == first}
    lines = []
    for where, contrast in _named(study.recipe):
        where = f"{where} ({contrast.better} against {contrast.than})"
        declared = set(contrast.differs_in if contrast.differs_in is not None else ASPECTS)
        for word in contrast.differs_in or ():
            kind, dot, setting = word.partition(".")
            if word not in ASPECTS and not (dot and kind and setting):
                lines.append(
                    f"{where}: differs_in {word!r} is not an aspect; choose from "
                    f"{', '.join(ASPECTS)}, or name a setting as KIND.KEY, such as grpo.lr"
                    f"{near(word, ASPECTS)}"
                )
        lines += [
            f"{where}: {found.key} is {found.better!r} in {contrast.better} and {found.than!r} in "
            f"{contrast.than}; make them equal, or add {' or '.join(found.allowed_by)} to "
            "differs_in"
            for found in _differences(arms[contrast.better], arms[contrast.than])
            if not set(found.allowed_by) & declared
        ]
    if lines:
        raise InputError("\n".join(dict.fromkeys(lines)))


def _named(recipe: Recipe) -> Iterator[tuple[str, Contrast]]:
    for index, contrast in enumerate(recipe.contrasts):
        yield f"contrasts[{index}]", contrast
    for name, hypothesis in recipe.hypotheses.items():
        for index, claim in enumerate(hypothesis.claims):
            yield f"hypotheses.{name}.claims[{index}]", claim
    if recipe.map is not None:
        yield "map", Contrast(better=recipe.map.rule, than=recipe.map.against)


def _differences(one: _Chains, other: _Chains) -> Iterator[Difference]:
    """Everything in which two arms differ."""
    yield from _make_up(one.route, other.route)
    if one.labels != other.labels:
        yield Difference("labels read", one.labels_shown(), other.labels_shown(), ("labels",))
    for kind in one.by_kind:
        if kind not in other.by_kind:
            continue
        yield from _settings(kind, one.by_kind[kind], other.by_kind[kind])
        if one.updates[kind] != other.updates[kind]:
            allowed = ("updates", f"{kind}.steps")
            yield Difference(f"{kind}.updates", one.updates[kind], other.updates[kind], allowed)


@dataclass(frozen=True, slots=True)
class _Chains:
    """One arm's stages after the bases; `labels` are the ids of every label it reads."""

    route: Route
    by_kind: Mapping[str, tuple[StageNode, ...]]
    updates: Mapping[str, int]
    labels: frozenset[str]

    @classmethod
    def of(cls, study: Study, plan: ArmPlan) -> _Chains:
        route = route_of(study.graph, plan)
        cached = [study.graph.nodes[one] for node in route.own for one in node.read_rollouts]
        by_kind: dict[str, tuple[StageNode, ...]] = {}
        for node in (*route.taught_by, *cached, *route.own):
            by_kind[node.kind] = (*by_kind.get(node.kind, ()), node)
        readers = [node for node in (*route.taught_by, *route.own) if node.kind in READS_LABELS]
        return cls(
            route=route,
            by_kind=by_kind,
            updates={
                kind: sum(work_of(study, node).updates for node in nodes)
                for kind, nodes in by_kind.items()
            },
            labels=frozenset(p.id for node in readers for p in study.problems_of(node)),
        )

    def labels_shown(self) -> str:
        """How many labels, and of which pools."""
        readers = (n for n in (*self.route.taught_by, *self.route.own) if n.kind in READS_LABELS)
        pools = dict.fromkeys(node.pool or "" for node in readers)
        return f"{len(self.labels)} of {', '.join(pools) or 'no pool'}"


def _make_up(one: Route, other: Route) -> Iterator[Difference]:
    """Differences in base models and in which stages there are."""
    if one.base != other.base:
        yield Difference("model evaluated", one.base, other.base, ("student_model",))
    if one.teacher_base != other.teacher_base:
        yield Difference("teacher_model", one.teacher_base, other.teacher_base, ("teacher",))
    for source in sorted({*one.teachers, *other.teachers}):
        sides = [
            words_of(*route.teachers[source]) if source in route.teachers else None
            for route in (one, other)
        ]
        if sides[0] != sides[1]:
            yield Difference(f"teacher of {source}", sides[0], sides[1], ("teacher",))
    moved = ("teacher",) if (one.teacher_base is None) != (other.teacher_base is None) else ()
    for aspect, first, second in (
        ("teacher", one.teacher, other.teacher),
        ("transfer", one.transfers, other.transfers),
        ("student", one.others, other.others),
    ):
        kinds = [[node.kind for node in nodes] for nodes in (first, second)]
        pools = [[f"{node.kind}({node.pool})" for node in nodes] for nodes in (first, second)]
        allowed = (aspect, *moved) if aspect == "student" else (aspect,)
        if kinds[0] != kinds[1]:
            yield Difference(f"{aspect} stages", kinds[0], kinds[1], allowed)
        elif pools[0] != pools[1]:
            about_labels = () if aspect == "transfer" else ("labels",)
            yield Difference(f"{aspect} pools", pools[0], pools[1], (*allowed, *about_labels))


def _settings(
    kind: str, better: Sequence[StageNode], than: Sequence[StageNode]
) -> Iterator[Difference]:
    """Settings whose values over all stages of a kind are not the same in both arms.

    Counts of updates are compared as totals; targets of cached rollouts follow from the transfer;
    adapters are a model's, and compared where both arms train the same one.
    """
    both = {node.model_name for node in better} & {node.model_name for node in than}
    sides = [
        [(node.model_name, hashed_settings(node.config)) for node in nodes]
        for nodes in (better, than)
    ]
    for key in dict.fromkeys(key for side in sides for _, config in side for key in config):
        if key == "kind" or key in _COUNTS or (kind, key) in _FOLLOWS:
            continue
        values = [
            _distinct(config.get(key) for name, config in side if key != "lora" or name in both)
            for side in sides
        ]
        if values[0] != values[1]:
            name = f"{kind}.{key}"
            one, other = (found[0] if len(found) == 1 else found for found in values)
            allowed = (name, "teacher") if key == "teacher" else (name,)
            yield Difference(_SHOWN_AS.get(name, name), one, other, allowed)


def _distinct(values: Iterator[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found, key=repr)
