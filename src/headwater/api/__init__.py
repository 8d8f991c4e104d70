"""The verbs of the command line, for Python. Each returns a record; none prints.

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
from headwater.api.records import Diagnosis, RecipeListing, RunReport, Samples, VerifiedCases
from headwater.api.study import follow, load, plan, report, run, samples

__all__ = [
    "Diagnosis",
    "Pilot",
    "RecipeListing",
    "RunReport",
    "Samples",
    "VerifiedCases",
    "contamination",
    "doctor",
    "evaluate",
    "evaluation_settings",
    "follow",
    "load",
    "named_sources",
    "pilot",
    "plan",
    "recipes",
    "report",
    "run",
    "samples",
    "schema",
    "verify",
]
