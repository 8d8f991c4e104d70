"""The model a command is about: an arm's in a run, a model folder, or a source such as hf:ID."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from headwater.comparison.candidates import candidates, fetch, slug
from headwater.errors import InputError
from headwater.workflow.confinement import require_own_files
from headwater.workflow.graph import ArmPlan, Role
from headwater.workflow.record import RUN_FILE, RunRecord, read_record
from headwater.workflow.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """One model of a run: of which arm and seed, in which role, and the stage that made it."""

    run_dir: Path
    record: RunRecord
    plan: ArmPlan
    role: Role
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model by name. source: a folder or a source; trained: where a run made it."""

    name: str
    source: str
    trained: TrainedModel | None = None


def choose_model(
    model: str, *, arm: str | None = None, seed: int | None = None, role: Role | None = None
) -> ChosenModel:
    """What `model` names: a run's folder with an arm, a model folder, or a source.

    arm: needed where a run has several. seed: the run's first one unless given, never the best.
    role: "teacher" or "student"; by default the model that the arm is evaluated by. Raises
    InputError for a model that does not exist, or is not finished.
    """
    run_dir = Path(model)
    if not (run_dir / RUN_FILE).is_file():
        given = {"--arm": arm, "--seed": seed, "--as": role}
        for option, value in given.items():
            if value is not None:
                raise InputError(
                    f"{option} {value} with {model}, which is no run's folder (no {RUN_FILE}): "
                    f"expected RUN {option} {value}; leave the option out, or give a run"
                )
        return ChosenModel(slug(model), model)
    require_own_files(run_dir)
    record = read_record(run_dir)
    plan = _plan(record, run_dir, arm, seed)
    role = role or plan.evaluates
    fingerprint = plan.teacher if role == "teacher" else plan.student
    if fingerprint is None:
        raise InputError(
            f"arm {plan.arm} has no {role}: expected --as {plan.evaluates}; choose that, or "
            "another arm"
        )
    folder = ArtifactStore(run_dir).path(fingerprint) / "model"
    if not folder.is_dir():
        raise InputError(
            f"{record.graph.describe(fingerprint)} of {run_dir} is not finished: expected its "
            "model; run the recipe again, which continues"
        )
    trained = TrainedModel(run_dir, record, plan, role, fingerprint)
    name = f"{record.name}-{plan.arm}" if role == plan.evaluates else f"{plan.arm}-{role}"
    return ChosenModel(slug(name), str(folder), trained)


@contextmanager
def model_folder(chosen: ChosenModel, seed: int = 0) -> Iterator[Path]:
    """The model as a folder for as long as the block runs; a source is fetched for it.

    seed: draws the weights of tiny models. Raises StageError for a run's model whose files are not
    those that were published, InputError for a source that is not to be had.
    """
    if chosen.trained is not None:
        ArtifactStore(chosen.trained.run_dir).get(chosen.trained.fingerprint)
        yield Path(chosen.source)
        return
    (candidate,) = candidates([chosen.source], seed)
    with TemporaryDirectory(prefix="headwater-") as scratch:
        yield fetch(candidate, Path(scratch))[0]


def _plan(record: RunRecord, run_dir: Path, arm: str | None, seed: int | None) -> ArmPlan:
    arms = tuple(dict.fromkeys(plan.arm for plan in record.graph.arms))
    if arm is None and len(arms) > 1:
        raise InputError(
            f"{run_dir} has {len(arms)} arms ({', '.join(arms)}): expected one; add --arm NAME"
        )
    plans = [plan for plan in record.graph.arms if plan.arm == (arm or arms[0])]
    if not plans:
        raise InputError(f"{run_dir} has no arm {arm!r}: expected one of {', '.join(arms)}")
    for plan in plans:
        if seed in (None, plan.seed):
            return plan
    seeds = ", ".join(str(plan.seed) for plan in plans)
    raise InputError(f"arm {plans[0].arm} has no seed {seed}: expected one of {seeds}")
