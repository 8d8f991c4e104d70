"""The verbs of the command line and the stages of a recipe, for Python. Each returns a record; none
prints.

Importing this package loads neither torch nor transformers: every verb imports what it needs.
"""

from headwater.api.evaluating import (
    contamination,
    evaluate,
    evaluation_settings,
    named_sources,
    verify,
)
from headwater.api.machine import doctor, recipes, schema
from headwater.api.pilot import Pilot, pilot
from headwater.api.publishing import chat, export
from headwater.api.records import (
    Completions,
    Diagnosis,
    RecipeListing,
    RunReport,
    Samples,
    StageRecord,
    VerifiedCases,
)
from headwater.api.stages import grpo, opd, pretrain, sample_sft, sft, warmup
from headwater.api.study import completions, follow, load, plan, report, run, samples

__all__ = [
    "Completions",
    "Diagnosis",
    "Pilot",
    "RecipeListing",
    "RunReport",
    "Samples",
    "StageRecord",
    "VerifiedCases",
    "chat",
    "completions",
    "contamination",
    "doctor",
    "evaluate",
    "evaluation_settings",
    "export",
    "follow",
    "grpo",
    "load",
    "named_sources",
    "opd",
    "pilot",
    "plan",
    "pretrain",
    "recipes",
    "report",
    "run",
    "sample_sft",
    "samples",
    "schema",
    "sft",
    "verify",
    "warmup",
]
