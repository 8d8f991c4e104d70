"""Every route and control of arXiv:2605.12483 by name, and its claims as hypotheses H1 to H7.

A recipe's `arms` may be `paper`, a list of names (and of arms of its own), or a mapping in which
an arm without a body is the paper's. All of it is turned into plain arms before validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config.claims import base_arm, cell_arm
from headwater.config.stages import GRPOStage
from headwater.near_names import near

#: The names the routes have in the paper's text.
ALIASES: Mapping[str, str] = {
    "R1": "cold_grpo",
    "R2": "sample_split",
    "R3": "bridge",
    "R3-full": "bridge",
    "R5": "half_split",
    "R5-half": "half_split",
    "R6": "sft_half_split",
    "R7": "replay",
    "R8": "opd_split",
}

_TRANSFERS: Mapping[str, tuple[str, ...]] = {
    "bridge": ("warmup", "opd"),
    "opd_only": ("opd",),
    "sample_sft": ("sample_sft",),
}
_TRANSFER_TITLES = {
    "bridge": "Bridge",
    "opd_only": "OPD only",
    "sample_sft": "Teacher-sample SFT",
}
_TAUGHT = {"raw": "the raw", "sft": "the SFT'd", "rl": "the RL'd"}


@dataclass(frozen=True, slots=True)
class _Route:
    """teacher, student: stages; "grpo:1H" reads the first half of the labels in half the steps.

    own_size: the teacher is a model of the student's size.
    """

    title: str
    teacher: tuple[str, ...] | None = None
    student: tuple[str, ...] | None = None
    own_size: bool = False


def _routes() -> dict[str, _Route]:
    """Routes with a teacher; `{teacher}` in a title is the teacher's name."""
    routes: dict[str, _Route] = {
        "base_teacher": _Route("Base {teacher}", teacher=()),
        "sft_teacher": _Route("SFT'd {teacher}", teacher=("sft",)),
        "direct_grpo": _Route("Direct GRPO on the {teacher}", teacher=("grpo",)),
    }
    training = {"raw": (), "sft": ("sft",), "rl": ("grpo",)}
    for transfer, stages in _TRANSFERS.items():
        for kind, teacher in training.items():
            name = transfer if kind == "rl" else f"{kind}_{transfer}"
            route = " (R3)" if name == "bridge" else ""
            title = f"{_TRANSFER_TITLES[transfer]} from {_TAUGHT[kind]} {{teacher}}{route}"
            routes[name] = _Route(title, teacher, stages)
        title = f"{_TRANSFER_TITLES[transfer]} from an RL'd model of the student's size"
        routes[f"same_size_{transfer}"] = _Route(title, ("grpo",), stages, own_size=True)
    for prefix, kind, codes in (("", "grpo", ("R5", "R7")), ("sft_", "sft", ("R6", "R6 replay"))):
        half = f"{'RL' if kind == 'grpo' else 'SFT'}'d {{teacher}} on half the labels, bridge"
        teacher, bridge = (f"{kind}:1H",), _TRANSFERS["bridge"]
        routes |= {
            f"{prefix}half_bridge": _Route(half, teacher, bridge),
            f"{prefix}half_split": _Route(
                f"{half}, GRPO on the rest ({codes[0]})", teacher, (*bridge, "grpo:2H")
            ),
            f"{prefix}replay": _Route(
                f"{half}, GRPO on the same half ({codes[1]})", teacher, (*bridge, "grpo:1H")
            ),
        }
    for name, transfer, code, words in (
        ("opd_split", "opd_only", "R8", "OPD only"),
        ("sample_split", "sample_sft", "R2", "teacher-sample SFT"),
    ):
        title = f"RL'd {{teacher}} on half the labels, {words}, GRPO on the rest ({code})"
        routes[name] = _Route(title, ("grpo:1H",), (*_TRANSFERS[transfer], "grpo:2H"))
    return routes


ROUTES: Mapping[str, _Route] = _routes()
STUDENT_ROUTES: Mapping[str, _Route] = {
    "base_student": _Route("Base student", student=()),
    "cold_grpo": _Route("Cold GRPO (R1)", student=("grpo",)),
}


def expand(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's plain values with `arms`, `hypotheses` and `map` written out.

    Raises ValueError with value, expectation and cure. What is malformed in another way is left
    as it is: validation says what is wrong with it.
    """
    expanded = dict(recipe)
    models = recipe.get("models")
    arms = recipe.get("arms")
    if isinstance(models, Mapping):
        named = _Named(recipe, [name for name in models if isinstance(name, str)])
        if isinstance(arms, str):
            arms = [arms]
        if isinstance(arms, Sequence):
            arms = _from_list(arms, named)
        if isinstance(arms, Mapping):
            arms = {
                name: named.arm(name) if body is None and isinstance(name, str) else body
                for name, body in arms.items()
            }
            expanded["arms"] = arms | _cells(recipe.get("map"), arms)
    if recipe.get("hypotheses") == "paper":
        expanded["hypotheses"] = paper_hypotheses(expanded.get("arms") or {})
    return expanded


def paper_hypotheses(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those of H1 to H7 whose arms are all there. Raises ValueError when none is."""
    known = set(arms)
    kept = {
        name: {"statement": statement, "claims": [dict(claim) for claim in claims]}
        for name, (statement, claims) in _HYPOTHESES.items()
        if all({claim["better"], claim["than"]} <= known for claim in claims)
    }
    if not kept:
        raise ValueError(
            "hypotheses: paper needs the paper's arms; set arms: paper, name some of them "
            "(cold_grpo, bridge, raw_bridge), or declare hypotheses of your own"
        )
    return kept


# --- arms ----------------------------------------------------------------------------------------


class _Named:
    """The paper's arms for the models and pools of one recipe."""

    def __init__(self, recipe: Mapping[str, Any], models: Sequence[str]) -> None:
        pools = recipe.get("pools")
        self._pools: Mapping[str, Any] = pools if isinstance(pools, Mapping) else {}
        self._models = models
        self._teachers = [name for name in models if name != "student"]
        split = self._pools.get("split", ["1H", "2H"])
        self._halves = list(split) if isinstance(split, list | tuple) else []
        self._steps = _grpo_steps(recipe)

    def arm(self, name: str) -> dict[str, Any]:
        """The arm of that name, which may end in `.MODEL` for a teacher other than `teacher`.

        Raises ValueError for a name that is none.
        """
        canonical = ALIASES.get(name, name)
        route_name, _, model = canonical.partition(".")
        route = STUDENT_ROUTES.get(canonical) or ROUTES.get(route_name)
        if route is None or (model and (route.own_size or model not in self._teachers)):
            known = [*STUDENT_ROUTES, *ROUTES, *ALIASES]
            raise ValueError(
                f"arms: {name!r} is not an arm of the paper; give it a `teacher` or `student` "
                f"chain, or choose from {', '.join(known)} (with .MODEL for another teacher)"
                f"{near(name, known)}"
            )
        return self._written_out(route, model or ("student" if route.own_size else "teacher"))

    def all(self, teachers: Sequence[str] | None) -> dict[str, dict[str, Any]]:
        """Every arm: all routes for each of `teachers`, direct GRPO for every model."""
        if "student" not in self._models or "teacher" not in self._models:
            raise ValueError(
                "arms: paper needs models called `student` and `teacher`; this recipe has "
                f"{', '.join(self._models) or 'none'}"
            )
        bridged = list(teachers if teachers is not None else self._teachers)
        unknown = [name for name in bridged if name not in self._teachers]
        if unknown:
            raise ValueError(
                f"arms.paper.teachers: {unknown[0]!r} is not one of {', '.join(self._teachers)}"
                f"{near(unknown[0], self._teachers)}"
            )
        names = list(STUDENT_ROUTES)
        for model in self._teachers:
            suffix = "" if model == "teacher" else f".{model}"
            for name, route in ROUTES.items():
                ladder = route.student is None and route.teacher != ("sft",)
                if route.own_size:
                    names += [name] if model == "teacher" else []
                elif model in bridged or ladder:
                    names.append(f"{name}{suffix}")
        return {name: self.arm(name) for name in names}

    def _written_out(self, route: _Route, model: str) -> dict[str, Any]:
        arm: dict[str, Any] = {"title": route.title.format(teacher=model)}
        half = any(":" in stage for stage in (*(route.teacher or ()), *(route.student or ())))
        if half and len(self._halves) != 2:
            raise ValueError(
                f"pools.split={self._halves} has {len(self._halves)} parts, but the paper's "
                "half-split arms need two; set split: [1H, 2H]"
            )
        if route.teacher is not None:
            arm["teacher"] = [self._stage(stage, half) for stage in route.teacher]
            arm["teacher_model"] = model
        if route.student is not None:
            arm["student"] = [self._stage(stage, half) for stage in route.student]
        return arm

    def _stage(self, stage: str, half: bool) -> Any:
        kind, _, part = stage.partition(":")
        pool = self._halves[{"1H": 0, "2H": 1}[part]] if part else None
        if kind == "sft":
            return {"sft": "worked" if self._pools.get("worked") else pool or "labels"}
        if kind == "grpo" and pool:
            # Half the labels are half the rollouts: the same number of epochs over each half.
            return {"grpo": {"pool": pool, "steps": max(1, self._steps // 2)}}
        if kind != "grpo" and half and not self._pools.get("prompts"):
            return {kind: self._halves[0]}
        return kind


def _grpo_steps(recipe: Mapping[str, Any]) -> int:
    stages = recipe.get("stages")
    grpo = stages.get("grpo") if isinstance(stages, Mapping) else None
    steps = grpo.get("steps") if isinstance(grpo, Mapping) else None
    return steps if isinstance(steps, int) else GRPOStage().steps


def _from_list(entries: Sequence[Any], named: _Named) -> dict[str, Any]:
    """Names of the paper's arms, `paper` for all of them, and mappings of arms."""
    arms: dict[str, Any] = {}
    for entry in entries:
        if entry == "paper":
            arms |= named.all(None)
        elif isinstance(entry, str):
            arms[ALIASES.get(entry, entry)] = named.arm(entry)
        elif isinstance(entry, Mapping) and set(entry) == {"paper"}:
            options = entry["paper"]
            if not isinstance(options, Mapping) or set(options) != {"teachers"}:
                raise ValueError(
                    f"arms: paper is given {options!r}; expected {{teachers: [MODEL, ...]}}"
                )
            arms |= named.all(options["teachers"])
        elif isinstance(entry, Mapping):
            arms |= entry
        else:
            raise ValueError(
                f"arms: {entry!r} is no arm; list names such as cold_grpo, or NAME: {{...}}"
            )
    return arms


# --- the map -------------------------------------------------------------------------------------


def _cells(spec: Any, arms: Mapping[Any, Any]) -> dict[str, Any]:
    """The arms of every cell of the map; {} for a recipe without one, or one that is malformed."""
    if not isinstance(spec, Mapping):
        return {}
    students, labels = spec.get("students"), spec.get("labels")
    roles = {spec.get(role): arms.get(spec.get(role)) for role in ("rule", "against")}
    if not isinstance(students, list | tuple) or not isinstance(labels, list | tuple):
        return {}
    cells: dict[str, Any] = {}
    for student in students:
        cells[base_arm(student)] = {
            "title": f"Base {student}",
            "student": [],
            "student_model": student,
        }
        for count in labels:
            for name, template in roles.items():
                if isinstance(name, str) and isinstance(template, Mapping):
                    cells[cell_arm(name, student, count)] = _cell(name, template, student, count)
    return {name: arm for name, arm in cells.items() if name not in arms}


def _cell(name: str, template: Mapping[str, Any], student: str, count: int) -> dict[str, Any]:
    cell = {**template, "student_model": student}
    cell["title"] = f"{template.get('title') or name}: {student}, {count} labels"
    for role in ("teacher", "student"):
        if template.get(role) is not None:
            cell[role] = [_with_labels(item, count) for item in template[role]]
    return cell


def _with_labels(item: Any, count: int) -> Any:
    """A chain's item that reads only the first `count` of the pool `labels`."""
    if isinstance(item, str):
        return {item: f"labels:{count}"} if item in ("grpo", "sft") else item
    if not isinstance(item, Mapping) or len(item) != 1:
        return item
    ((kind, body),) = item.items()
    settings = {"pool": body} if isinstance(body, str) else dict(body or {})
    pool = settings.get("pool", "labels" if kind in ("grpo", "sft") else None)
    if pool is None or pool in ("prompts", "worked"):
        return item
    if pool != "labels":
        raise ValueError(
            f"map: {kind} reads pool {pool!r}, but the map sets the number of `labels`; use arms "
            "that read the pool labels"
        )
    return {kind: {**settings, "pool": f"labels:{count}"}}


# --- hypotheses ----------------------------------------------------------------------------------


def _claim(better: str, than: str, *differs_in: str, **more: Any) -> dict[str, Any]:
    return {"better": better, "than": than, "differs_in": list(differs_in), **more}


_HYPOTHESES: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "H1": (
        "With the same labels, a bridge from an RL'd teacher beats direct GRPO on the student.",
        [_claim("bridge", "cold_grpo", "teacher", "transfer")],
    ),
    "H2": (
        "A bridge from the raw teacher is worse than direct GRPO: size alone is not the cause.",
        [_claim("cold_grpo", "raw_bridge", "teacher", "transfer", "labels")],
    ),
    "H3": (
        "Through the same bridge, an RL'd teacher beats an SFT'd one, and that a raw one.",
        [
            _claim("sft_bridge", "raw_bridge", "teacher", "labels"),
            _claim("bridge", "sft_bridge", "teacher", "labels"),
        ],
    ),
    "H4": (
        "From the same teacher, the bridge beats OPD alone, and that teacher-sample SFT.",
        [
            _claim("bridge", "opd_only", "transfer"),
            _claim("opd_only", "sample_sft", "transfer"),
        ],
    ),
    "H5": (
        "After the bridge, GRPO on new labels beats the bridge alone, replayed labels and cold "
        "GRPO.",
        [
            _claim("half_split", "half_bridge", "student", "labels", "updates"),
            _claim("half_split", "replay", "labels"),
            _claim("half_split", "cold_grpo", "teacher", "transfer"),
        ],
    ),
    "H6": (
        "The second half of the labels does at least as much for the teacher as for the bridged "
        "student.",
        [_claim("bridge", "half_split", "teacher", "transfer", "student", not_worse_by=0.01)],
    ),
    "H7": (
        "An RL'd teacher of the student's own size still beats direct GRPO: density helps "
        "without size.",
        [_claim("same_size_bridge", "cold_grpo", "teacher", "transfer")],
    ),
}
