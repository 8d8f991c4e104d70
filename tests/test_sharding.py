"""What sharded weights need of a process alone to be true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils.checkpoint import checkpoint

from headwater.config.recipe import ModelSpec
from headwater.engine import sharding
from headwater.engine.forward import hidden_at_targets, load_engine_model
from headwater.engine.packing import PackedGroup, pack
from stage_jobs import Run, make_job


def test_a_state_in_the_hosts_memory_stays_there() -> None:
    """Of weights that GPUs compute with: a checkpoint is read into the state itself."""
    mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    weight = torch.zeros(4, 2)
    meta = TensorMeta(weight.shape, weight.stride(), weight.dtype)
    whole = DTensor(weight, DTensorSpec(mesh, (Shard(0),), meta), requires_grad=False)
    mean = torch.zeros(4, 2)
    found = sharding.like_sharded(mean, whole)
    assert isinstance(found, DTensor) and (found.shape, found.placements) == ((4, 2), (Shard(0),))
    assert sharding.local_part(found).data_ptr() == mean.data_ptr()


def test_layers_are_computed_again_for_a_backward_pass_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(source="tiny:student")
    folder = Run(make_job("source", spec, tmp_path)).start().model_dir
    cpu = torch.device("cpu")
    batch = pack([PackedGroup((1, 2, 3), ((4, 5),), (0,))], dtype=torch.float32, device=cpu)
    again_for: list[bool] = []

    def counted(*inputs: Any, **named: Any) -> Any:
        again_for.append(torch.is_grad_enabled())
        return checkpoint(*inputs, **named)

    monkeypatch.setattr(sharding, "checkpoint", counted)
    plain, again = (load_engine_model(folder, torch.float32, cpu) for _ in range(2))
    sharding.recompute_layers(again)
    for model in (plain, again):
        hidden_at_targets(model, batch).square().sum().backward()
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    with torch.inference_mode():
        found = hidden_at_targets(again, batch)
    assert torch.equal(found, hidden_at_targets(plain, batch).detach())
    assert again_for == [True] * again.config.num_hidden_layers
