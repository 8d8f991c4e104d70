"""A pilot: what both base models do with a few labels before a study spends the rest of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.config.recipe import Recipe
from headwater.evals.base_rates import BaseRates, Share, base_rates
from headwater.ledger import Ledger
from headwater.ledger.spending import Spending
from headwater.stages.job import METRICS
from headwater.storage import disk_errors
from headwater.types import AttemptTable
from headwater.workflow.advice import Advice, Measured, advise
from headwater.workflow.confinement import require_own_files
from headwater.workflow.outcome import read_attempts, read_probe
from headwater.workflow.pilot_study import Allocation, PilotStudy, pilot_study
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import make_view
from headwater.workflow.projection import Trial, end, gain, lead
from headwater.workflow.record import LEDGER_FILE, RUN_FILE
from headwater.workflow.recorded_data import unchanged_data
from headwater.workflow.run import run_stages
from headwater.workflow.store import ArtifactStore, run_lock

_ATTEMPTS_FILE = "attempts.parquet"


@dataclass(frozen=True, slots=True)
class PilotedModel:
    """One base model. gained: by the trial; end: projected for the whole stage. None without."""

    name: str
    rates: BaseRates
    gained: Share | None = None
    end: Share | None = None


@dataclass(frozen=True, slots=True)
class PilotOutcome:
    """What a pilot measured and advises, and what that took.

    lead: the teacher's projected end less the student's. distance: KL both ways in nats, entropies,
    top_overlap, overlap_mass on the student's answers. prompt_tokens: of the longest prompt. spent:
    by attempts and distance; trial: by the trial's GRPO. Neither is in any arm's account or budget.
    """

    name: str
    seed: int
    teacher: PilotedModel
    student: PilotedModel
    lead: Share | None
    advice: Advice
    distance: Mapping[str, float]
    prompt_tokens: int
    arms: Mapping[Allocation, str]
    labels: int
    problems: int
    attempts: int
    group_size: int
    trial_steps: int
    trial_labels: int
    spent: Spending
    trial: Spending
    warnings: tuple[str, ...] = ()

    @property
    def mean_response(self) -> int:
        """Tokens of a response, the mean of the model that writes longer ones."""
        return max(1, math.ceil(max(m.rates.mean_tokens for m in (self.teacher, self.student))))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run_pilot(
    recipe: Recipe,
    out_dir: Path,
    *,
    problems: int | None = None,
    attempts: int | None = None,
    trial_steps: int | None = None,
    quiet: bool = False,
) -> PilotOutcome:
    """Measure the first seed's base models in `out_dir`, where a run finds them again.

    Writes artifacts and ledger entries only: what the folder says of a run there stays. Arguments
    and InputError: as of `pilot_study`. Raises StageError and Interrupted as a run does.
    """
    study = prepare_study(recipe, seeds=recipe.seeds[:1])
    piloted = pilot_study(study, problems=problems, attempts=attempts, trial_steps=trial_steps)
    view = make_view(piloted.study.graph, quiet=quiet)
    require_own_files(out_dir)
    with disk_errors(out_dir), run_lock(out_dir):
        unchanged_data(study.sources, out_dir / RUN_FILE)
        run_stages(piloted.study, out_dir, view=view)
        return _read(piloted, out_dir)


def _read(piloted: PilotStudy, out_dir: Path) -> PilotOutcome:
    store = ArtifactStore(out_dir)
    study, graph = piloted.study, piloted.study.graph
    (seed,) = graph.seeds
    models, trials = {}, {}
    for role, model in piloted.models.items():
        before = _attempts(store, model.attempts, seed)
        rates = base_rates(before, piloted.group_size)
        models[role] = PilotedModel(model.name, rates)
        if model.after_trial is not None:
            after = _attempts(store, model.after_trial, seed)
            trial = Trial(_scores_Q(before), _scores_Q(after), model.stretch)
            trials[role] = trial
            models[role] = PilotedModel(model.name, rates, gain(trial), end(trial))
    ahead = lead(trials["teacher"], trials["student"]) if trials else None
    measured = Measured(
        teacher=models["teacher"].rates,
        student=models["student"].rates,
        lead=ahead,
        labels=study.recipe.pools.labels,
        has_halves="half_split" in piloted.arms,
    )
    measuring = [f for f, node in graph.nodes.items() if node.is_evaluation]
    tried = [model.trial for model in piloted.models.values() if model.trial]
    with Ledger(out_dir / LEDGER_FILE) as ledger:
        spent, trial_spent = ledger.spending(measuring, "eval"), ledger.spending(tried)
    distance = dict(read_probe(store, piloted.probe))
    return PilotOutcome(
        name=study.recipe.name,
        seed=seed,
        teacher=models["teacher"],
        student=models["student"],
        lead=ahead,
        advice=advise(measured),
        distance={name: value for name, value in distance.items() if name != "positions"},
        prompt_tokens=_prompt_tokens(store, piloted.models["student"].attempts),
        arms=piloted.arms,
        labels=study.recipe.pools.labels,
        problems=piloted.problems,
        attempts=piloted.attempts,
        group_size=piloted.group_size,
        trial_steps=piloted.trial_steps,
        trial_labels=piloted.trial_labels,
        spent=spent,
        trial=trial_spent,
        warnings=study.warnings,
    )


def _attempts(store: ArtifactStore, fingerprint: str, seed: int) -> AttemptTable:
    return read_attempts([store.path(fingerprint) / _ATTEMPTS_FILE], (seed,))


def _scores_Q(table: AttemptTable) -> np.ndarray:
    scores_Q: np.ndarray = table.correct[0].mean(axis=1)
    return scores_Q


def _prompt_tokens(store: ArtifactStore, fingerprint: str) -> int:
    """Tokens of the longest of the pilot's prompts."""
    lines = (store.path(fingerprint) / METRICS).read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["longest_prompt_tokens"]) for line in lines)
