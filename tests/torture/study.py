"""The run that is tortured: micro models, and every kind of stage there is."""

from __future__ import annotations

from typing import Any

from headwater.config.loading import validate_recipe
from headwater.workflow.prepare import prepare_study
from headwater.workflow.study import Study

_TASK = "task:arithmetic?steps=1-2&operations=+-"
_OFTEN = {"checkpoint_seconds": 0.02}
_STEPS = _OFTEN | {"steps": 5, "lr": 1e-3}
_SAMPLED = _STEPS | {"prompts_per_step": 4, "group_size": 4}

RECIPE: dict[str, Any] = {
    "name": "torture",
    "task": {
        "train": f"{_TASK}&count=60&seed=1",
        "worked": f"{_TASK}&count=60&seed=3",
        "eval": {"held_out": f"{_TASK}&count=9&seed=2"},
        "verifier": "python:torture.grading:grade",
        "prompt": "bare",
    },
    "models": {
        "teacher": {"source": "tiny:small", "prepare": [{"pretrain": {"steps": 20}}]},
        "student": {"source": "tiny:student", "prepare": [{"pretrain": {"steps": 20}}, "sft"]},
    },
    "pools": {"labels": 12, "prompts": 12, "worked": 12},
    "sampling": {"max_new_tokens": 10},
    "stages": {
        "pretrain": _STEPS | {"batch_size": 16, "lr": 4e-3, "warmup_steps": 2},
        "sft": _STEPS | {"batch_size": 6},
        "grpo": _SAMPLED,
        "warmup": _STEPS | {"batch_size": 6},
        "sample_sft": _STEPS | {"batch_size": 6},
        "opd": _SAMPLED,
    },
    "arms": {
        "cold": {"student": [{"grpo": {"dynamic_sampling": {"max_rounds": 2}}}]},
        "bridge": {
            "teacher": [{"grpo": {"kl": {"coefficient": 0.1}}}],
            "student": ["warmup", "opd"],
        },
        "hard": {"teacher": ["grpo"], "student": ["sample_sft"]},
    },
    "contrasts": [
        {
            "better": "bridge",
            "than": "cold",
            "differs_in": ["teacher", "transfer", "grpo.kl", "grpo.dynamic_sampling"],
        }
    ],
    "diagnostics": {"prompts": 4},
    "evaluation": {"attempts": 2, "batch_prompts": 3},
    "compute": {"device": "cpu", "precision": "float32", "threads": 1},
}
#: Fewer stages, for the tests: seconds instead of tens of them.
SMALL_ARMS = {"bridge": {"teacher": ["grpo"], "student": ["warmup", "opd"]}}


def make_study(*, processes: int = 2, small: bool = False) -> Study:
    """The tortured study, with so many worker processes."""
    changes: dict[str, Any] = {"compute": RECIPE["compute"] | {"processes": processes}}
    if small:
        changes |= {"arms": SMALL_ARMS, "contrasts": []}
    return prepare_study(validate_recipe(RECIPE | changes))
