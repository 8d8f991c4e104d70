"""The rollouts of each step, drawn when they are needed or one step ahead.

One step ahead, servers draw the next rollouts and score them while the model trains on those
before. They then come from weights that are one update (of GRPO: one batch of updates) older than
those they train; `sampler_logprobs` say what they were drawn with. Truncated importance weights
correct GRPO and sampled distillation for it; an exact KL is taken at states one update old. What is
drawn does not depend on whether anything ran at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.config.stages import GRPOStage, MixedStage, OPDStage, Sampling
from headwater.engine.recording import RecordedForward, is_recorded
from headwater.rollout.engines import Serving
from headwater.stages.learner import Learner
from headwater.stages.rollouts import ProblemStream, RolloutBatch, RolloutSource
from headwater.storage import flush
from headwater.types import FinishReason, Problem, Rollout, RolloutGroup

#: A teacher's opinion of rollouts, asked by the main rank, beside training.
Score = Callable[[Sequence[Rollout]], Any]


def source_of(learner: Learner, sampling: Sampling | None) -> RolloutSource:
    """Rollouts of the model in training, by this process or by servers."""
    job, closing = learner.job, learner.context.closing
    assert job.model_dir is not None
    return RolloutSource(
        job,
        learner.model,
        learner.tokenizer,
        sampling,
        serving=Serving(
            job.model_dir, job.checkpoint_dir, closing, lambda: learner.updater.steps_done
        ),
        on_fewer_rows=learner.halved_rows,
        world=learner.world,
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rollouts of one step. scores: what `Score` said of them; version: how many updates the
    weights had that drew them."""

    problems: list[Problem]
    batch: RolloutBatch
    scores: Any
    version: int


class StepRollouts:
    """Draws P prompts and G rollouts of each for every step, with overlap one step ahead.

    The learner saves what is drawn ahead with its checkpoints. score: asked about the rollouts of
    the steps that `scores_step` names.
    """

    def __init__(
        self,
        learner: Learner,
        config: GRPOStage | OPDStage | MixedStage,
        source: RolloutSource,
        score: Score | None = None,
        scores_step: Callable[[int], bool] = lambda step: True,
    ) -> None:
        job = learner.job
        self._learner, self._config, self._source = learner, config, source
        self._score_of = lambda step: score if scores_step(step) else None
        self._stream = ProblemStream(job.problems, job.seed, job.stream)
        self._held: dict[int, Callable[[], Drawn]] = {}  # of this step and the next
        if config.overlap:
            learner.before_saving = self._save
            self._restore()

    def take(self, step: int) -> Drawn:
        """The rollouts of a step; with overlap, those of the next are begun."""
        begun = self._held.get(step)
        self._held = {}  # what the last step left is freed before anything is drawn
        self._held[step] = begun or self._begin(step)
        drawn = self._held[step]()
        if self._config.overlap and step + 1 < self._learner.total_steps:
            self._held[step + 1] = self._begin(step + 1)
        return drawn

    def lag(self, drawn: Drawn) -> dict[str, float]:
        """The metric `policy_lag`: updates made since these rollouts were drawn; with overlap."""
        lag = self._learner.updater.steps_done - drawn.version
        return {"policy_lag": float(lag)} if self._config.overlap else {}

    def _problems(self, step: int) -> list[Problem]:
        prompts = self._config.prompts_per_step
        return self._stream.take(step * prompts, prompts)

    def _begin(self, step: int) -> Callable[[], Drawn]:
        """Start drawing a step's rollouts; the result is waited for when it is called, once."""
        version, problems = self._learner.updater.steps_done, self._problems(step)
        group_size, recorded = self._config.group_size, self._recorded(step)
        score = self._score_of(step)
        finish = self._source.begin(problems, group_size, step, score, recorded)
        found: list[Drawn] = []

        def finished() -> Drawn:
            if not found:
                groups, scores = finish()
                batch = RolloutBatch(tuple(groups), recorded)
                found.append(Drawn(problems, batch, scores, version))
            return found[0]

        return finished

    def _recorded(self, step: int) -> RecordedForward | None:
        """Where the sampler writes down the forward pass that the step trains on, if it can: the
        weights must be the same, and all tokens on this process at once."""
        learner = self._learner
        checkpointing = learner.job.compute.activation_checkpointing
        apart = self._config.overlap or learner.world.size > 1 or checkpointing
        return RecordedForward(learner.budget.tokens) if is_recorded(step) and not apart else None

    # --- across a checkpoint ------------------------------------------------------------------

    def _save(self) -> None:
        """Keep what the next step trains on beside the checkpoint: of a step that a budget ends in
        the middle, its own rollouts."""
        learner, step = self._learner, self._learner.next_step
        if step in self._held:
            write = partial(_write, step, self._held[step]())
            learner.world.from_main(lambda: learner.kept.keep_ahead(step, write))

    def _restore(self) -> None:
        learner = self._learner
        found = learner.world.from_main(lambda: _read(learner.kept.ahead))
        if found is None:
            return
        step, version, rollouts = found
        problems = self._problems(step)
        size = len(rollouts) // len(problems)
        groups = tuple(
            RolloutGroup(problem.id, tuple(rollouts[place * size : (place + 1) * size]))
            for place, problem in enumerate(problems)
        )
        scores = self._source.score(rollouts, self._score_of(step))
        drawn = Drawn(problems, RolloutBatch(groups), scores, version)
        self._held = {step: lambda: drawn}


def _write(step: int, drawn: Drawn, path: Path) -> None:
    rows = [
        {
            "prompt_ids": list(rollout.prompt_ids),
            "response_ids": list(rollout.response_ids),
            "logprobs": rollout.sampler_logprobs.tolist(),
            "finish_reason": rollout.finish_reason.value,
            "policy_version": rollout.policy_version,
            "step": step,
            "version": drawn.version,
        }
        for rollout in drawn.batch.rollouts
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
    flush(path)


def _read(path: Path | None) -> tuple[int, int, list[Rollout]] | None:
    """(step, version, rollouts) of what is kept; None where nothing is."""
    if path is None:
        return None
    rows = pq.read_table(path).to_pylist()
    rollouts = [
        Rollout(
            tuple(row["prompt_ids"]),
            tuple(row["response_ids"]),
            np.array(row["logprobs"], dtype=np.float32),
            FinishReason(row["finish_reason"]),
            row["policy_version"],
        )
        for row in rows
    ]
    return rows[0]["step"], rows[0]["version"], rollouts


_SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("step", pa.int64()),
        ("version", pa.int64()),
    ]
)
