"""Weights that are spread over ranks by torch's FSDP2, and taken together where they are needed.

Each rank keeps a part of every weight, of its gradient and of its optimiser state. A layer is
gathered for its forward and again for its backward pass; gradients are added up over ranks, never
averaged: the engine divides by global counts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from headwater.engine.ranks import Ranks
from headwater.models.saving import build_from_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model is spread. device: where each rank computes; dtype: of the weights as they
    compute, and of activations; offload: the parts of the weights and of the optimiser lie in the
    host's memory, not a GPU's."""

    world: Ranks
    device: torch.device
    dtype: torch.dtype
    offload: bool = False


def recompute_layers(model: PreTrainedModel) -> None:
    """Have the backward pass compute each layer again, and keep nothing of it but its input."""
    for layer in model.get_decoder().layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A layer whose backward pass computes it again; as it is where there will be none."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    # no layer draws random numbers, whose state would be kept for the second time otherwise
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def shard(model: PreTrainedModel, sharding: Sharding) -> None:
    """Spread the float32 weights of a model over all ranks; each keeps its part.

    The model's own `forward` is then that of its body: hidden states, no logits.
    """
    settings: dict[str, Any] = {
        "mesh": sharding.world.mesh(sharding.device),
        # rotary tables come as inputs and stay float32
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if sharding.offload else OffloadPolicy(),
    }
    decoder = model.get_decoder()
    model.forward = decoder.forward
    for layer in decoder.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every weight is whole on every rank, in the format that computes.

    Ranks may then run the model without gradients as often as each needs. All ranks enter and
    leave together. A model that is not sharded is left as it is.
    """
    modules = list(_sharded_modules(model))
    for module in modules:
        module.unshard()
        if module is not model:
            module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            if module is not model:
                module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_sharded(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part` as this rank's share of a tensor that is spread as `whole` is."""
    if not isinstance(whole, DTensor):
        return part
    # not `from_local`, which copies what lies in the host's memory to the GPU that computes with it
    return DTensor(part, whole._spec, requires_grad=False)


def whole_model(model: PreTrainedModel, *, keep: bool) -> PreTrainedModel | None:
    """A sharded model's copy in the host's memory on ranks that `keep` it, None on others; a model
    that is not sharded as it is. All ranks call it."""
    if not is_sharded(model):
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = whole.detach().cpu()
    if not keep:
        return None
    library_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    return build_from_state(library_class, model.config, state, model.generation_config)


def _sharded_modules(model: torch.nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
