"""The stages of a pilot: both base models as a run makes them, tried on a few of its labels.

A pilot's study has nothing of the recipe's arms but their base models and, for the trial, the
first steps of their GRPO. Base models have the fingerprints they have in a run, so whatever
prepares them is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from headwater.config.arms import Arm, Chain, ChainItem
from headwater.config.evaluation import Evaluation
from headwater.config.recipe import Budget, Diagnostics, Recipe
from headwater.config.stages import READS_TEACHER, GRPOStage
from headwater.errors import InputError
from headwater.tasks.problems import LabelledProblems
from headwater.workflow.data_identity import identify
from headwater.workflow.graph import ArmPlan, Graph, Role
from headwater.workflow.planner import GraphBuilder
from headwater.workflow.prepare import graph_data
from headwater.workflow.projection import stretch
from headwater.workflow.study import Study

#: The pilot's problems, as its stages name them.
PILOT = "pilot"
#: Problems that are tried where nobody says how many; at most half of the labels.
PROBLEMS = 64
#: Steps of the trial where nobody says how many; at most a third of the recipe's.
TRIAL_STEPS = 8

Allocation = Literal["cold_grpo", "bridge", "half_split"]


@dataclass(frozen=True, slots=True)
class PilotModel:
    """One of the two models; `attempts` and `after_trial` are fingerprints of evaluations.

    stretch: how much longer its whole GRPO is than the trial (`projection.stretch`).
    """

    name: str
    base: str
    attempts: str
    trial: str | None = None
    after_trial: str | None = None
    stretch: float = 1.0


@dataclass(frozen=True)
class PilotStudy:
    """What a pilot runs.

    study: the stages, ready to run. models: teacher and student. probe: fingerprint of the
    distance between their bases. arms: the recipe's arm for each allocation it has. problems: how
    many are tried, `attempts` times each. group_size: rollouts that share a prompt in the
    recipe's GRPO. trial_steps: 0 for no trial. trial_labels: how many labels the trial learns
    from, none of them tried.
    """

    study: Study
    models: Mapping[Role, PilotModel]
    probe: str
    arms: Mapping[Allocation, str]
    problems: int
    attempts: int
    group_size: int
    trial_steps: int
    trial_labels: int


def pilot_study(
    study: Study,
    *,
    problems: int | None = None,
    attempts: int | None = None,
    trial_steps: int | None = None,
) -> PilotStudy:
    """The pilot of a prepared study, at the first of its recipe's seeds.

    problems: how many of the labels are tried, by default 64 and at most half. attempts: at each
    of them, by default twice the group size. trial_steps: GRPO steps on each base model, by
    default a third of the recipe's and at most 8; 0 for none. Raises InputError for numbers that
    cannot work and for a recipe without an arm that trains a teacher for its student.
    """
    recipe = study.recipe
    arms = allocations(recipe)
    names, items = _models(recipe, arms)
    whole = {role: _grpo_settings(recipe, item) for role, item in items.items()}
    group_size = max(settings.group_size for settings in whole.values())
    attempts = 2 * group_size if attempts is None else attempts
    if attempts < group_size:
        raise InputError(
            f"--attempts {attempts}: expected at least the recipe's group size, {group_size}, to "
            f"tell which groups would have signal; give {group_size} or more"
        )
    steps = _trial_steps(trial_steps, min(settings.steps for settings in whole.values()))
    labels = study.pools.labelled("labels")
    count = _problems(problems, len(labels.problems))
    trial_labels = len(labels.problems) - count
    tried = LabelledProblems.of(labels.problems[-count:], labels.labels[-count:])
    builder = _PilotBuilder(recipe, study, tried, attempts, whole)
    models = {}
    for role, name in names.items():
        models[role] = builder.model(name, role)
        if steps:
            times = stretch(steps, whole[role].steps, whole[role].warmup_steps)
            item = items[role].model_copy(
                update={
                    "pool": _rest(trial_labels),
                    "overrides": {**items[role].overrides, "steps": steps},
                }
            )
            models[role] = builder.trained(models[role], role, item, times)
    probe = builder.distance(models["student"].base, models["teacher"].base, count)
    return PilotStudy(
        study=replace(
            study,
            # Nothing of a pilot counts against what the recipe's own stages may spend.
            recipe=recipe.model_copy(update={"budget": Budget()}),
            graph=builder.graph(models["teacher"], models["student"], probe),
            evals={**study.evals, PILOT: tried},
        ),
        models=models,
        probe=probe,
        arms=arms,
        problems=count,
        attempts=attempts,
        group_size=group_size,
        trial_steps=steps,
        trial_labels=trial_labels if steps else 0,
    )


def allocations(recipe: Recipe) -> dict[Allocation, str]:
    """The recipe's first arm for each way to use the labels, by what its chains do.

    All are about one student: that of the first arm with a teacher that GRPO trains. Raises
    InputError where there is no such arm.
    """
    kinds = {name: _allocation(arm) for name, arm in recipe.arms.items()}
    taught = [name for name, kind in kinds.items() if kind in ("bridge", "half_split")]
    if not taught:
        raise InputError(
            f"arms {', '.join(recipe.arms)}: expected one whose student learns from a teacher that "
            "grpo trains, or there is nothing to choose between; add for instance "
            "bridge: {teacher: [grpo], student: [warmup, opd]}"
        )
    student = recipe.arms[taught[0]].student_model
    found: dict[Allocation, str] = {}
    for name, kind in kinds.items():
        if kind is not None and recipe.arms[name].student_model == student:
            found.setdefault(kind, name)
    return found


def _allocation(arm: Arm) -> Allocation | None:
    kinds = {item.kind for item in arm.student or ()}
    if not kinds & READS_TEACHER:
        return "cold_grpo" if "grpo" in kinds else None
    if not any(item.kind == "grpo" for item in arm.teacher or ()):
        return None
    return "half_split" if "grpo" in kinds else "bridge"


def _models(
    recipe: Recipe, arms: Mapping[Allocation, str]
) -> tuple[dict[Role, str], dict[Role, ChainItem]]:
    """Names of teacher and student, and the GRPO that the recipe would train each with."""
    first = recipe.arms[arms.get("bridge") or arms["half_split"]]
    cold = recipe.arms[arms["cold_grpo"]].student if "cold_grpo" in arms else None
    names: dict[Role, str] = {"teacher": first.teacher_model, "student": first.student_model}
    items: dict[Role, ChainItem] = {
        "teacher": _grpo(first.teacher or ()),
        "student": _grpo(cold or (ChainItem(kind="grpo"),)),
    }
    return names, items


def _grpo(chain: Chain) -> ChainItem:
    return next(item for item in chain if item.kind == "grpo")


def _grpo_settings(recipe: Recipe, item: ChainItem) -> GRPOStage:
    settings = recipe.stage(item)
    assert isinstance(settings, GRPOStage)
    return settings


def _trial_steps(asked: int | None, whole: int) -> int:
    steps = min(TRIAL_STEPS, max(1, whole // 3)) if asked is None else asked
    if not 0 <= steps <= whole:
        raise InputError(
            f"--trial {steps}: expected 0 to {whole}, the steps of the recipe's GRPO: a trial is "
            "a piece of it; give fewer steps, or 0 for no trial"
        )
    return steps


def _problems(asked: int | None, labels: int) -> int:
    if labels < 2:
        raise InputError(
            f"pools.labels={labels}: expected 2 or more, to try the models on some and train on "
            "others; give more labels"
        )
    most = labels // 2
    problems = min(PROBLEMS, most) if asked is None else asked
    if not 1 <= problems <= most:
        raise InputError(
            f"--problems {problems}: expected 1 to {most}, half of pools.labels={labels}; ask for "
            "fewer, or give more labels"
        )
    return problems


def _rest(labels: int) -> str:
    """The pool that a trial learns from: the labels before those that are tried."""
    return f"labels:{labels}"


class _PilotBuilder(GraphBuilder):
    """A recipe's base models, with the stages that only a pilot has."""

    def __init__(
        self,
        recipe: Recipe,
        study: Study,
        tried: LabelledProblems,
        attempts: int,
        whole: Mapping[Role, GRPOStage],
    ) -> None:
        data = graph_data(recipe, study.pools, {PILOT: tried})
        rest = _rest(len(study.pools["labels"]) - len(tried.problems))
        others = identify(study.pools[rest], study.pools.labels(rest))
        super().__init__(recipe, replace(data, pools={**data.pools, rest: others}))
        self._seed = recipe.seeds[0]
        self._evaluation = Evaluation(attempts=attempts)
        self._whole = whole

    def model(self, name: str, role: Role) -> PilotModel:
        """A base model and attempts of it."""
        base = self.base(name, self._seed)
        return PilotModel(name, base, self.attempts(base, role))

    def trained(self, model: PilotModel, role: Role, item: ChainItem, times: float) -> PilotModel:
        """The model with a trial, GRPO by `item`, and attempts after it."""
        trial = self.chain([item], model.base, role, self._seed)
        after = self.attempts(trial, role)
        return replace(model, trial=trial, after_trial=after, stretch=times)

    def attempts(self, model: str, role: Role) -> str:
        """Attempts of a model at the pilot's problems, drawn as its GRPO would."""
        config = self._evaluation.model_dump(mode="json")
        grpo = self._whole[role].model_dump(mode="json")
        config["sampling"] = sampling = self._sampling(grpo)
        return self._add(
            kind="evaluate",
            config=config,
            seed=self._seed,
            stream=f"evaluate:{PILOT}",
            role=role,
            model_name=self.nodes[model].model_name,
            eval_set=PILOT,
            model=model,
            sampling=sampling,
        )

    def distance(self, student: str, teacher: str, problems: int) -> str:
        """How far the student is from the teacher on its own answers to the pilot's problems."""
        config = Diagnostics(prompts=problems).model_dump(mode="json")
        config["sampling"] = sampling = self._sampling(config)
        return self._add(
            kind="probe",
            config=config,
            seed=self._seed,
            stream=f"probe:{PILOT}",
            role="student",
            model_name=self.nodes[student].model_name,
            eval_set=PILOT,
            model=student,
            teacher=teacher,
            sampling=sampling,
        )

    def graph(self, teacher: PilotModel, student: PilotModel, probe: str) -> Graph:
        """The stages as one arm of the two base models and one of the two after their trials."""
        plans = [self._plan(PILOT, teacher.base, student.base, teacher.attempts, student.attempts)]
        plans[0] = replace(plans[0], probes={"start": probe})
        if teacher.trial and student.trial and teacher.after_trial and student.after_trial:
            ends = (teacher.trial, student.trial, teacher.after_trial, student.after_trial)
            plans.append(self._plan("trial", *ends))
        return Graph(self.nodes, tuple(plans))

    def _plan(self, name: str, teacher: str, student: str, taught: str, learned: str) -> ArmPlan:
        return ArmPlan(
            arm=name,
            seed=self._seed,
            evaluates="student",
            teacher=teacher,
            student=student,
            teacher_evaluations={PILOT: taught},
            student_evaluations={PILOT: learned},
        )
