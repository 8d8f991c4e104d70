"""Drawing problems and rollouts for a step, and turning them into training batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from headwater import seeding
from headwater.config.evaluation import EvaluationSampling
from headwater.config.stages import Sampling
from headwater.engine.fused_layers import Known
from headwater.engine.packing import PackedGroup, TokenBatch
from headwater.engine.recording import RecordedForward
from headwater.engine.sharding import gathered
from headwater.losses.grpo import token_weights
from headwater.models.end_tokens import end_token_ids
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.engines import Serving, make_sampler
from headwater.rollout.sampler import (
    MAX_ROWS,
    InProcessSampler,
    OnFewerRows,
    SampleRequest,
    SamplerSettings,
)
from headwater.rollout.vllm_sampler import VLLMSampler
from headwater.stages.job import StageJob
from headwater.tasks.prompts import encode_prompt
from headwater.types import Completion, FinishReason, Problem, Rollout, RolloutGroup
from headwater.verify.grading import Grade
from headwater.world import SOLO, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

#: Encoded prompts that are kept; of a pool beyond that each is encoded anew when its turn comes.
_PROMPTS_KEPT = 65_536
#: Columns of `rollouts.parquet`.
ROLLOUT_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("step", pa.int32()),
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("verdict", pa.string()),
        ("reward", pa.float32()),
        ("response_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("advantage", pa.float32()),
    ]
)


class ProblemStream:
    """The stage's problems in a seeded order, epoch after epoch; place n is always the same."""

    def __init__(self, problems: Sequence[Problem], seed: int, stream: str) -> None:
        self._problems = problems
        self._names = (seed, stream)
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, start: int, count: int) -> list[Problem]:
        """Problems at places start, ..., start + count - 1."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> Problem:
        epoch, index = divmod(place, len(self._problems))
        if epoch not in self._epochs:
            rng = seeding.generator(*self._names, "order", epoch)
            self._epochs = {epoch: rng.permutation(len(self._problems))} | {
                e: order for e, order in self._epochs.items() if e == epoch - 1
            }
        return self._problems[int(self._epochs[epoch][index])]


class RolloutSource:
    """Rollouts of a model on the stage's problems, seeded by (stage, step, problem, sample).

    serving: what servers need to know of the model, where servers sample; world: ranks that draw
    together. on_fewer_rows: told, on all of them, where memory ran out.
    """

    def __init__(
        self,
        job: StageJob,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None,
        *,
        serving: Serving | None = None,
        max_rows: int = MAX_ROWS,
        on_fewer_rows: OnFewerRows | None = None,
        world: World = SOLO,
    ) -> None:
        self._job, self._tokenizer, self._world = job, tokenizer, world
        self.sampling = sampling or job.sampling
        drawn = EvaluationSampling.model_validate(self.sampling.model_dump())
        settings = SamplerSettings(
            temperature=drawn.temperature,
            max_new_tokens=drawn.max_new_tokens,
            end_ids=end_token_ids(model, tokenizer),
            vocab_size=usable_vocabulary(tokenizer),
            top_p=drawn.top_p,
            top_k=drawn.top_k,
        )
        self._model, self._on_fewer_rows, self._serving = model, on_fewer_rows, serving
        self._thread: ThreadPoolExecutor | None = None
        self._sampler = make_sampler(
            job.compute,
            model,
            settings,
            serving,
            max_rows=max_rows,
            on_fewer_rows=self._note_fewer_rows,
        )
        self._fewer_rows: list[tuple[int, int, str]] = []
        self._prompts: dict[str, tuple[int, ...]] = {}

    def draw(self, problems: Sequence[Problem], group_size: int, step: int) -> list[RolloutGroup]:
        """G rollouts of each problem; `step` names the randomness.

        A problem that comes twice (a pool smaller than the batch) is drawn anew each time.
        """
        groups, _ = self.begin(problems, group_size, step)()
        return groups

    def begin(
        self,
        problems: Sequence[Problem],
        group_size: int,
        step: int,
        score: Callable[[Sequence[Rollout]], T] | None = None,
        recorded: RecordedForward | None = None,
    ) -> Callable[[], tuple[list[RolloutGroup], T | None]]:
        """Start what `draw` does; returns how to wait for it, which all ranks call, once.

        Servers draw with the weights of this moment while the caller goes on; in this process all
        is drawn at once. score: asked, by the main rank and beside the caller, what it says of all
        rollouts, in order; what it returns comes with them. recorded: where this process writes
        down its forward pass.
        """
        requests, world = self._requests(problems, group_size, step), self._world
        drawn: list[tuple[Rollout, ...]] | None = None  # None while servers draw
        if isinstance(self._sampler, VLLMSampler):
            served = self._sampler
            with gathered(self._model):
                world.from_main(lambda: served.push(requests))
            sample = partial(served.ask, requests)
        else:
            drawn = self._sample(requests, recorded)
            sample = partial(list, drawn)

        def work() -> tuple[list[tuple[Rollout, ...]] | None, T | None]:
            """What other ranks do not have yet: rollouts of servers, and scores."""
            found = sample()
            rollouts = [rollout for group in found for rollout in group]
            scores = None if score is None else score(rollouts)
            return found if drawn is None else None, scores

        beside = drawn is None or score is not None
        waits = self._beside(work) if beside and world.is_main else work

        def finish() -> tuple[list[RolloutGroup], T | None]:
            told, scores = world.from_main(waits) if beside else (None, None)
            found = drawn if drawn is not None else told
            assert found is not None
            pairs = zip(problems, found, strict=True)
            return [RolloutGroup(p.id, rollouts) for p, rollouts in pairs], scores

        return finish

    def score(
        self, rollouts: Sequence[Rollout], score: Callable[[Sequence[Rollout]], T] | None
    ) -> T | None:
        """What the main rank's `score` says of these rollouts, on all ranks."""
        return None if score is None else self._world.from_main(lambda: score(rollouts))

    def _beside(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin work in a thread; returns how to wait for it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
            if self._serving is not None:
                self._serving.closing.callback(self._thread.shutdown, cancel_futures=True)
        return self._thread.submit(work).result

    def _requests(
        self, problems: Sequence[Problem], group_size: int, step: int
    ) -> list[SampleRequest]:
        job = self._job
        seen: Counter[str] = Counter()
        requests = []
        for p in problems:
            keys = tuple(
                seeding.derive_key(job.seed, job.stream, "sample", step, p.id, sample)
                for sample in range(seen[p.id], seen[p.id] + group_size)
            )
            seen[p.id] += group_size
            requests.append(SampleRequest(self.prompt_ids(p), keys))
        return requests

    def _sample(
        self, requests: Sequence[SampleRequest], recorded: RecordedForward | None
    ) -> list[tuple[Rollout, ...]]:
        """Each rank samples its share of the requests; all get all of the rollouts."""
        world, sampler = self._world, self._sampler
        assert isinstance(sampler, InProcessSampler)
        with gathered(self._model):
            own = sampler.sample(world.share(requests), recorded)
        told, self._fewer_rows = self._fewer_rows, []
        parts = world.gather((own, told))
        for _, fewer in parts:
            for rows, before, said in fewer:
                if self._on_fewer_rows is not None:
                    self._on_fewer_rows(rows, before, said)
        return world.merge([drawn for drawn, _ in parts])

    def _note_fewer_rows(self, rows: int, before: int, said: str) -> None:
        self._fewer_rows.append((rows, before, said))

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The problem's prompt through the chat template, encoded once for a pool of usual size."""
        if problem.id not in self._prompts:
            if len(self._prompts) >= _PROMPTS_KEPT:
                self._prompts.clear()
            encoded = encode_prompt(self._tokenizer, problem, self._job.prompt_form)
            self._prompts[problem.id] = tuple(encoded)
        return self._prompts[problem.id]

    def text(self, rollout: Rollout) -> Completion:
        """The response as text, without the end token, and its tokens with it."""
        ids = rollout.response_ids
        return Completion(self._tokenizer.decode(ids, skip_special_tokens=True), ids)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Flat view of groups: row i of N is rollout i % G of group i // G.

    recorded: the sampler's forward pass over them, if it was kept.
    """

    groups: tuple[RolloutGroup, ...]
    recorded: RecordedForward | None = None

    @property
    def rollouts(self) -> list[Rollout]:
        """All N rollouts in row order."""
        return [r for group in self.groups for r in group.rollouts]

    @property
    def lengths_N(self) -> torch.Tensor:
        """Response tokens of each row, int64 [N]."""
        return torch.tensor([len(r.response_ids) for r in self.rollouts])

    def packed(
        self, keep: Sequence[bool] | None = None, teachers: Sequence[int] | None = None
    ) -> list[PackedGroup]:
        """Groups ready for packing, numbered by row; `keep` leaves whole groups out.

        teachers: the number of each group's.
        """
        packed, row = [], 0
        for index, group in enumerate(self.groups):
            rows = tuple(range(row, row + len(group.rollouts)))
            row += len(group.rollouts)
            if keep is None or keep[index]:
                responses = tuple(r.response_ids for r in group.rollouts)
                teacher = 0 if teachers is None else teachers[index]
                prompt = group.rollouts[0].prompt_ids
                packed.append(PackedGroup(prompt, responses, rows, teacher))
        return packed

    def known(self, micro: Sequence[PackedGroup], tokens: TokenBatch) -> Known | None:
        """What the layers came to on a micro-batch of these rows, while that is recorded."""
        recorded = self.recorded
        return None if recorded is None else recorded.read(micro, tokens.input_ids[0])

    def per_token(self, values_N: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
        """A value of each row spread over its tokens in a micro-batch: [T]."""
        return values_N.to(row_T.device)[row_T]

    def sampler_logprobs(self, rows: Sequence[int], device: torch.device) -> torch.Tensor:
        """The sampler's log-probabilities of the tokens of `rows`, in packing order: [T]."""
        rollouts = self.rollouts
        return torch.from_numpy(
            np.concatenate([rollouts[row].sampler_logprobs for row in rows])
        ).to(device)

    def token_weights(self, kind: Any, max_tokens: int) -> tuple[torch.Tensor, float]:
        """Weight of each row's tokens and the global denominator; see `losses.grpo`."""
        return token_weights(self.lengths_N, kind, max_tokens)

    def shape_metrics(self) -> dict[str, float]:
        """Response length, truncation and repetition of the batch, and whether the sampler's
        forward pass was what it trained on."""
        rollouts = self.rollouts
        truncated = sum(r.finish_reason is FinishReason.LENGTH for r in rollouts)
        return {
            "response_tokens": float(self.lengths_N.float().mean()),
            "truncation_rate": truncated / len(rollouts),
            "repetition": float(np.mean([repetition(r.response_ids) for r in rollouts[:64]])),
            "forward_recorded": float(self.recorded is not None and self.recorded.was_read),
        }


def repetition(ids: Sequence[int], order: int = 4) -> float:
    """Share of a response's token 4-grams that it has used before: 0 is none, near 1 a loop.

    >>> round(repetition([1, 2, 3, 4, 1, 2, 3, 4]), 3)
    0.2
    """
    grams = [tuple(ids[i : i + order]) for i in range(len(ids) - order + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def readable_rows(
    job: StageJob,
    step: int,
    batch: RolloutBatch,
    texts: Sequence[str],
    problems: Sequence[Problem],
    grades: Sequence[Grade] | None = None,
    advantages: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Rows for `rollouts.parquet`; grades and advantages are those of the batch's rows."""
    rows = []
    for n, rollout in enumerate(batch.rollouts):
        group, sample = divmod(n, len(batch.groups[0].rollouts))
        grade = None if grades is None else grades[n]
        rows.append(
            {
                "stage": job.fingerprint,
                "step": step,
                "problem_id": problems[group].id,
                "sample": sample,
                "prompt": problems[group].prompt,
                "response": texts[n],
                "verdict": None if grade is None else grade.verdict.value,
                "reward": None if grade is None else grade.reward,
                "response_tokens": len(rollout.response_ids),
                "finish_reason": rollout.finish_reason.value,
                "advantage": None if advantages is None else advantages[n],
            }
        )
    return rows
