"""Fetching a model: whatever its source, a Hugging Face folder comes out."""

from __future__ import annotations

from headwater.config.recipe import ModelSpec
from headwater.models.sources import materialise
from headwater.stages.job import StageContext, StageJob


def run(job: StageJob, context: StageContext) -> None:
    """Write the model that `job.config` names to `output_dir/model`."""
    config = job.config
    assert isinstance(config, ModelSpec)
    materialise(
        config.source,
        job.output_dir / "model",
        layers=config.layers,
        parent_dir=job.model_dir,
        seed=job.seed,
    )
