"""The work of one step on prompts of random words: sample, learn, note the seconds.

The parts are those the stages use: sampler, packing, body, chunked head and losses, updater,
frozen teacher.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from headwater import seeding
from headwater.config.compute import Compute
from headwater.config.stages import GRPOStage, OPDStage, TrainingStage, WarmupStage
from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.memory import keep_freed_memory
from headwater.engine.packing import PackedGroup, TokenBatch, micro_batches, pack
from headwater.engine.precision import resolve_device, resolve_dtype, set_threads
from headwater.engine.recording import RecordedForward, is_recorded
from headwater.engine.update import StepResult, Updater
from headwater.errors import InputError
from headwater.losses.chunked_head import ChunkLoss, chunked_head_loss
from headwater.losses.grpo import group_advantages, zero_variance
from headwater.losses.token_losses import (
    PolicySettings,
    PolicyTerms,
    distillation_loss,
    policy_loss,
)
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.rollout.scoring import FrozenModel
from headwater.stages.rollouts import RolloutBatch
from headwater.types import LossSums, RolloutGroup
from roofline import synchronize
from shapes import END_ID, FIRST_WORD_ID, config_of, model_folder

STAGES: dict[str, type[TrainingStage]] = {
    "grpo": GRPOStage,
    "opd": OPDStage,
    "warmup": WarmupStage,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What to run; the names are those of the command line."""

    kind: str
    model: str
    teacher: str | None = None
    batch: int = 16
    group: int = 8
    prompt_len: int = 64
    completion_len: int = 64
    steps: int = 4
    warmup: int = 1
    threads: int | None = None
    vary: int = 0
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    micro_batch_tokens: int | None = None
    roofline: int = 1
    workdir: Path = Path("runs/bench")

    def check(self) -> None:
        """Raises InputError for work that cannot be done as asked."""
        if self.batch < 1 or self.group < 1 or self.batch % self.group:
            raise InputError(
                f"batch={self.batch} is not a multiple of group={self.group}; the batch counts "
                "completions, so give it whole groups"
            )
        if self.kind == "grpo" and self.group < 2:
            raise InputError(f"group={self.group} gives no advantages; set --group >= 2 for grpo")
        if self.kind != "grpo" and self.teacher is None:
            raise InputError(f"{self.kind} learns from a teacher; give --teacher")
        if min(self.steps, self.prompt_len, self.completion_len) < 1:
            raise InputError("steps, prompt-len and completion-len must each be at least 1")


@dataclass(slots=True)
class Clocks:
    """Seconds of every step: whole, sampling, forward passes with their fused head gradients."""

    step: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    loss_forward: list[float] = field(default_factory=list)


class Bench:
    """A model in training, as a stage holds it, on prompts of random words."""

    def __init__(self, options: Options) -> None:
        options.check()
        keep_freed_memory()
        self.options = options
        compute = Compute.model_validate({"device": options.device, "precision": options.dtype})
        self.device = resolve_device(compute)
        self.threads = set_threads(options.threads)
        self.folder = model_folder(options.model, options.workdir, options.seed)
        self.config = config_of(self.folder)
        self.vocab_size = self.config["vocab_size"]
        self.dtype = resolve_dtype(compute, self.device, self.config["hidden_size"])
        self.stage = _stage(options)
        self.model = load_engine_model(self.folder, torch.float32, self.device)
        self.updater = Updater(self.model, self.stage, options.steps, self.dtype)
        self.teacher, self.teacher_config = self._load_teacher()
        self._rng = random.Random(options.seed)
        self._prompts = [self._prompt() for _ in range(options.steps * self.groups)]
        by_teacher = self.teacher is not None and options.kind == "warmup"
        self._sampler = InProcessSampler(
            self.teacher.model if self.teacher and by_teacher else self.model,
            SamplerSettings(
                temperature=1.0,
                max_new_tokens=options.completion_len,
                end_ids=(END_ID,),
                vocab_size=self.vocab_size,
                forbid_end=True,
            ),
        )
        self.clocks = Clocks()

    @property
    def groups(self) -> int:
        """Prompts a step."""
        return self.options.batch // self.options.group

    def _load_teacher(self) -> tuple[FrozenModel | None, dict[str, int]]:
        options = self.options
        if options.kind == "grpo" or options.teacher is None:
            return None, {}
        folder = model_folder(options.teacher, options.workdir, options.seed + 1)
        config = config_of(folder)
        if config["vocab_size"] != self.vocab_size:
            raise InputError(
                f"teacher {options.teacher} has {config['vocab_size']} tokens, the model "
                f"{self.vocab_size}; give two models of one vocabulary"
            )
        return FrozenModel.load(folder, self.device, self.dtype, self.vocab_size), config

    def _prompt(self) -> tuple[int, ...]:
        """As the peer's scripts draw them, so that both sides train on the same prompts."""
        return tuple(
            self._rng.randrange(FIRST_WORD_ID, self.vocab_size)
            for _ in range(self.options.prompt_len)
        )

    def run(self) -> StepResult:
        """All steps; returns what the last one did."""
        result = StepResult(0.0, 0.0, {})
        for step in range(self.options.steps):
            result = self.run_step(step)
        return result

    def run_step(self, step: int) -> StepResult:
        """Sample, learn, and note the seconds of both."""
        synchronize(self.device)
        started = time.perf_counter()
        self.batch = self._sample(step)
        synchronize(self.device)
        self.clocks.generate.append(time.perf_counter() - started)
        self.clocks.loss_forward.append(0.0)
        result = self._train(self.batch)
        synchronize(self.device)
        self.clocks.step.append(time.perf_counter() - started)
        return result

    def _sample(self, step: int) -> RolloutBatch:
        prompts = self._prompts[step * self.groups : (step + 1) * self.groups]
        names = (self.options.seed, self.options.kind, "sample", step)
        requests = [
            SampleRequest(
                prompt,
                tuple(seeding.derive_key(*names, p, i) for i in range(self.options.group)),
            )
            for p, prompt in enumerate(prompts)
        ]
        may_record = self.options.kind != "warmup" and is_recorded(step)
        recorded = RecordedForward(self.stage.micro_batch_tokens) if may_record else None
        drawn = self._sampler.sample(requests, recorded)
        groups = tuple(RolloutGroup(str(p), rows) for p, rows in enumerate(drawn))
        batch = RolloutBatch(groups, recorded)
        return self._cut(batch) if self.options.vary else batch

    def _cut(self, batch: RolloutBatch) -> RolloutBatch:
        """Ragged lengths that depend on no end token: uniform in [C/8, C], the first one C."""
        longest = self.options.completion_len
        low = max(1, longest // 8)
        lengths = [self._rng.randint(low, longest) for _ in batch.rollouts]
        lengths[0] = longest
        left = iter(lengths)

        def shortened(group: RolloutGroup) -> RolloutGroup:
            rows = tuple(
                replace(r, response_ids=r.response_ids[:n], sampler_logprobs=r.sampler_logprobs[:n])
                for r, n in zip(group.rollouts, left, strict=False)
            )
            return replace(group, rollouts=rows)

        return RolloutBatch(tuple(shortened(group) for group in batch.groups), batch.recorded)

    # --- learning ---------------------------------------------------------------------------

    def _train(self, batch: RolloutBatch) -> StepResult:
        kind = self.options.kind
        self.micros = list(micro_batches(self._packed(batch), self.stage.micro_batch_tokens))
        if kind == "grpo":
            loss_of = self._policy_losses(batch)
        else:
            loss_of = self._divergences(batch, forward_weight=0.0 if kind == "opd" else 1.0)
        losses = (self._timed(partial(self._loss, micro, loss_of)) for micro in self.micros)
        return self.updater.step(losses, float(batch.lengths_N.sum()))

    def _packed(self, batch: RolloutBatch) -> list[PackedGroup]:
        """Whole groups; the warmup stage reads cached rollouts one by one, without their group."""
        packed = batch.packed()
        if self.options.kind != "warmup":
            return packed
        return [
            PackedGroup(group.prompt_ids, (completion,), (row,))
            for group in packed
            for completion, row in zip(group.completions, group.rows, strict=True)
        ]

    def _loss(
        self, micro: Sequence[PackedGroup], loss_of: Callable[[TokenBatch], ChunkLoss]
    ) -> LossSums:
        tokens = pack(micro, dtype=self.dtype, device=self.device)
        chunk_loss = loss_of(tokens)
        hidden = hidden_at_targets(self.model, tokens, self.batch.known(micro, tokens))
        return chunked_head_loss(hidden, head_weight(self.model, self.vocab_size), chunk_loss)

    def _timed(self, compute: Callable[[], LossSums]) -> Callable[[], LossSums]:
        def timed() -> LossSums:
            started = time.perf_counter()
            sums = compute()
            synchronize(self.device)
            self.clocks.loss_forward[-1] += time.perf_counter() - started
            return sums

        return timed

    def _policy_losses(self, batch: RolloutBatch) -> Callable[[TokenBatch], ChunkLoss]:
        stage = self.stage
        assert isinstance(stage, GRPOStage)
        advantages_N = group_advantages(_rewards(batch), stage.advantage).reshape(-1)
        weights_N, _ = batch.token_weights(stage.normalization, self.options.completion_len)
        settings = PolicySettings(stage.clip_low, stage.clip_high, stage.importance_cap)

        def loss_of(tokens: TokenBatch) -> ChunkLoss:
            terms = PolicyTerms(
                targets_T=tokens.target_ids_T,
                advantages_T=batch.per_token(advantages_N, tokens.row_T),
                weights_T=batch.per_token(weights_N, tokens.row_T),
                sampler_logprobs_T=batch.sampler_logprobs(tokens.rows, self.device),
            )
            return policy_loss(terms, settings, lambda logprobs, part: None)

        return loss_of

    def _divergences(
        self, batch: RolloutBatch, forward_weight: float
    ) -> Callable[[TokenBatch], ChunkLoss]:
        """To the teacher's whole distribution, which is scored here, on whichever rollouts."""
        teacher, on_policy = self.teacher, self.options.kind == "opd"
        assert teacher is not None

        def loss_of(tokens: TokenBatch) -> ChunkLoss:
            ones = torch.ones(tokens.target_ids_T.shape[0], device=self.device)
            gap = batch.sampler_logprobs(tokens.rows, self.device) if on_policy else None
            return distillation_loss(
                tokens.target_ids_T,
                ones,
                teacher.targets(tokens),
                forward_weight=forward_weight,
                sampler_logprobs_T=gap,
            )

        return loss_of


def _stage(options: Options) -> TrainingStage:
    budget = options.micro_batch_tokens
    changes = {} if budget is None else {"micro_batch_tokens": budget}
    return STAGES[options.kind].model_validate({"lr": 1e-6, **changes})


def _rewards(batch: RolloutBatch) -> torch.Tensor:
    """0 or 1 by the parity of a completion's ids and place, float32 [P, G].

    A group that comes out all alike has its first reward turned, so that every step trains on
    every completion: groups without gradient would be left out, and the work would not be fixed.
    """
    parity = [float((sum(r.response_ids) + i) % 2) for i, r in enumerate(batch.rollouts)]
    rewards_PG = torch.tensor(parity).view(len(batch.groups), -1)
    flat = zero_variance(rewards_PG)
    rewards_PG[flat, 0] = 1.0 - rewards_PG[flat, 0]
    return rewards_PG
