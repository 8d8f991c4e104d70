"""The model a stage trains, on this rank, and the frozen models beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwater.config.lora import LoRA
from headwater.config.stages import TrainingStage
from headwater.engine.adapters import ADAPTER, Adapters, AdapterStart, prepare_adapters
from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.packing import PackedGroup, TokenBatch, pack
from headwater.engine.precision import resolve_device, resolve_dtype
from headwater.engine.ranks import Ranks
from headwater.engine.sharding import Sharding, recompute_layers, shard
from headwater.models.loading import load_tokenizer
from headwater.models.saving import save_model
from headwater.models.size import hidden_size
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.scoring import FrozenModel
from headwater.seeding import derive_key
from headwater.stages.job import StageJob
from headwater.types import LossSums
from headwater.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trainee:
    """A model in float32, whole on a process alone and spread over the ranks of a world.

    adapters: what is trained of it; None for all. dtype: of what it computes; parameters: how many
    it has, on all ranks together.
    """

    def __init__(self, job: StageJob, world: World) -> None:
        assert job.model_dir is not None and isinstance(job.config, TrainingStage)
        self.world = world
        self.device = resolve_device(job.compute)
        self.dtype = resolve_dtype(job.compute, self.device, hidden_size(job.model_dir))
        self.tokenizer = load_tokenizer(job.model_dir)
        self.vocab_size = usable_vocabulary(self.tokenizer)
        self._sharding = (
            Sharding(world, self.device, self.dtype, job.compute.cpu_offload)
            if isinstance(world, Ranks)
            else None
        )
        lora = job.config.lora
        # sharding moves a layer at a time to the GPU, which the whole need not fit on, and a model
        # with adapters moves in the format that computes
        alone = self._sharding is None and not lora
        place = self.device if alone else torch.device("cpu")
        start_dir = (job.base_dir if lora else None) or job.model_dir
        self.model = load_engine_model(start_dir, torch.float32, place)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        start = self._adapter_start(job, lora, start_dir) if lora else None
        if job.compute.activation_checkpointing:
            recompute_layers(self.model)
        if self._sharding is not None:
            shard(self.model, self._sharding)
        self.adapters = (
            None
            if start is None
            else Adapters(self.model, start, dtype=self.dtype, device=self.device, world=world)
        )
        self._frozen: list[FrozenModel] = []
        self.resting: tuple[FrozenModel, ...] = ()  # of them, those that no micro-batch asks now

    def _adapter_start(self, job: StageJob, lora: LoRA, base_dir: Path) -> AdapterStart:
        """New adapters, or those of the stage before, where they are relative to the same base."""
        assert job.model_dir is not None
        continued = None if base_dir == job.model_dir else job.model_dir.with_name(ADAPTER)
        seed = derive_key(job.seed, job.stream, "lora")
        return prepare_adapters(self.model, lora, base_dir, seed, continued)

    def write_model(self, trained: PreTrainedModel, job: StageJob) -> None:
        """Write the trained model, and the adapters it was trained through, as a stage's output."""
        save_model(trained, self.tokenizer, job.output_dir / "model")
        if self.adapters is not None:
            base_name = job.options.get("base_name", str(job.model_dir))
            self.adapters.save(job.output_dir / ADAPTER, base_name)

    def frozen(self, folder: Path) -> FrozenModel:
        """A teacher or reference beside the model, on the same ranks.

        Where a micro-batch needs its opinion, that must come before the model's own forward pass:
        ranks that have no micro-batch go through the same models in that order.
        """
        found = FrozenModel.load(folder, self.device, self.dtype, self.vocab_size, self._sharding)
        self._frozen.append(found)
        return found

    def idle(self) -> LossSums:
        """A micro-batch of nothing: gathers weights and adds up gradients with the other ranks."""
        for model in self._frozen:
            if not any(model is one for one in self.resting):
                self.idle_beside(model)
        hidden = hidden_at_targets(self.model, self._nothing())
        zero = (hidden.sum() + head_weight(self.model)[:1].sum()) * 0.0
        return LossSums(zero, 0.0)

    def idle_beside(self, model: FrozenModel) -> None:
        """Gathers a frozen model's weights with other ranks, whose micro-batches ask it."""
        model.targets(self._nothing())

    def _nothing(self) -> TokenBatch:
        return pack([PackedGroup((0,), ((0,),), (0,))], dtype=self.dtype, device=self.device)
