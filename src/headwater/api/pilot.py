"""What a few labels say of where the rest should go, before they are spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.api.study import load, plan, run_folder

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe
    from headwater.workflow.estimate import Plan
    from headwater.workflow.pilot import PilotOutcome


@dataclass(frozen=True, slots=True)
class Pilot:
    """What was measured and is advised, and what the recipe's arms would cost with responses as
    long as measured, at the pilot's seed; where the pilot's artifacts are."""

    run_dir: Path
    found: PilotOutcome
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        arms = {
            allocation: {"arm": name, "spending": arm.spending.as_dict()}
            for allocation, name in self.found.arms.items()
            for arm in self.plan.arms
            if arm.arm == name
        }
        return {"run": str(self.run_dir), **self.found.as_dict(), "costs": arms}


def pilot(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    problems: int | None = None,
    attempts: int | None = None,
    trial_steps: int | None = None,
    quiet: bool = False,
) -> Pilot:
    """Measure a recipe's base models on a few of its labels, and say which arm they speak for.

    Runs at the recipe's first seed in the run's folder, default runs/NAME, where `run` finds the
    base models again; the same call continues, or reads what is there. problems, attempts,
    trial_steps: labels tried (64, at most half), attempts at each (twice the group size), steps of
    a trial of GRPO on both models (8, at most a third; 0 for none). Raises InputError for whatever
    `run` would refuse and for a recipe without a teacher-first arm, StageError for a stage that
    failed, Interrupted after Ctrl-C.
    """
    from headwater.workflow.pilot import run_pilot

    loaded = load(recipe, overrides, profile)
    run_dir = run_folder(loaded, out)
    found = run_pilot(
        loaded,
        run_dir,
        problems=problems,
        attempts=attempts,
        trial_steps=trial_steps,
        quiet=quiet,
    )
    cost = plan(loaded, run_dir, seeds=[found.seed], mean_response=found.mean_response)
    return Pilot(run_dir, found, cost)
