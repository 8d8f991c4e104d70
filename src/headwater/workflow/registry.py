"""From a stage's kind to the function that runs it."""

from __future__ import annotations

from importlib import import_module

from headwater.stages.job import StageContext, StageJob

_MODULES = {
    "source": "headwater.stages.source",
    "pretrain": "headwater.stages.pretrain",
    "sft": "headwater.stages.sft",
    "grpo": "headwater.stages.grpo",
    "teacher_rollouts": "headwater.stages.teacher_rollouts",
    "outside_rollouts": "headwater.stages.outside_rollouts",
    "warmup": "headwater.stages.warmup",
    "sample_sft": "headwater.stages.sample_sft",
    "opd": "headwater.stages.opd",
    "mixed": "headwater.stages.mixed",
    "evaluate": "headwater.evals.attempts",
    "probe": "headwater.evals.probe",
}


def run_stage(job: StageJob, context: StageContext) -> None:
    """Run one stage in this process; torch is imported only now."""
    if job.compute.deterministic:
        import_module("headwater.engine.determinism").use_deterministic_algorithms()
    with context.closing:
        import_module(_MODULES[job.kind]).run(job, context)
