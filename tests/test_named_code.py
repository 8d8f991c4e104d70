"""Code that a recipe names is announced, and a plan does not run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.config.loading import validate_recipe
from headwater.workflow.identities import own_code_warnings
from headwater.workflow.prepare import prepare_study
from test_workflow_run import RECIPE

CODE = """
from pathlib import Path
Path({owned!r}).mkdir()
def check(completion, gold):
    return True
def reward(completions, **row):
    return [1.0 for _ in completions]
"""


@pytest.mark.parametrize("spec", ["python:{file}:check", "reward:{file}:reward"])
def test_a_plan_says_that_code_would_run_and_does_not_run_it(tmp_path: Path, spec: str) -> None:
    file, owned = tmp_path / "strangers.py", tmp_path / "owned"
    file.write_text(CODE.format(owned=str(owned)), encoding="utf-8")
    spec = spec.format(file=file)
    recipe = validate_recipe(RECIPE | {"task": RECIPE["task"] | {"verifier": spec}})
    planned = prepare_study(recipe, planning=True)
    assert planned.warnings[0].startswith(f"this recipe runs code: its verifier {spec} is called")
    assert not owned.exists()
    study = prepare_study(recipe)  # a run does
    assert study.warnings[0] == planned.warnings[0]
    assert owned.exists()


@pytest.mark.parametrize("spec", ["math", "exact", "math:boxed", "reasoning_gym"])
def test_built_in_verifiers_are_not_announced(spec: str) -> None:
    assert own_code_warnings(spec) == ()
