"""Training a model through low-rank adapters, as a reparametrisation of its weights.

What computes are the merged weights W = W0 + s B A, s = alpha / rank (arXiv:2106.09685), so that
layers, sampler, head and servers see an ordinary model. What is trained are A [r, in] and
B [out, r]. By the chain rule their gradients follow from that of W [out, in]: dA = s B^T dW and
dB = s dW A^T; dW is dropped as soon as it is projected. The only module that knows peft, whose
initialisation and whose files these are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from headwater.config.lora import LoRA
from headwater.engine.nf4 import NF4
from headwater.engine.sharding import is_sharded, local_part
from headwater.errors import StageError
from headwater.models.loading import load_model
from headwater.world import SOLO, World

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

#: Where an artifact has its adapter, beside `model/`.
ADAPTER = "adapter"
_WEIGHTS = "adapter_model.safetensors"
#: A module's A and B.
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AdapterStart:
    """Adapters to be trained, and the folder of the model that they are relative to."""

    settings: LoRA
    base_dir: Path
    pairs: Mapping[str, Pair]


def prepare_adapters(
    model: PreTrainedModel, settings: LoRA, base_dir: Path, seed: int, continued: Path | None = None
) -> AdapterStart:
    """A and B for the modules of `model` that `settings` target, as peft draws them from `seed`.

    base_dir: where the model came from. continued: the folder of an adapter to go on with instead.
    Only the targets' weights want gradients afterwards. Raises StageError for a target that the
    model does not have, and an adapter to go on with that does not fit.
    """
    from peft import get_peft_model

    targets = settings.target_modules
    if not isinstance(targets, str):
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if absent := sorted({*targets} - names):
            raise StageError(
                f"lora.target_modules={absent}: {type(model).__name__} has no such modules; "
                "expected names of its linear layers: use all-linear"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            model, _peft_config(settings, targets if isinstance(targets, str) else list(targets))
        )
    pairs = {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    wrapped.unload()  # gives the modules back as they were
    for name in pairs:
        _weight_of(model, name).requires_grad_(True)
    if continued is not None:
        pairs = _read(continued, pairs)
    return AdapterStart(settings, base_dir, pairs)


def _peft_config(settings: LoRA, targets: str | list[str], **more: Any) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        **more,
    )


def _read(folder: Path, like: Mapping[str, Pair]) -> dict[str, Pair]:
    """A and B of the adapter in `folder`. Raises StageError where they are not shaped `like`."""
    tensors = load_file(folder / _WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in _in_file(like).items()}:
        raise StageError(
            f"{folder / _WEIGHTS}: not the adapters that this stage goes on with; expected A and "
            f"B of {len(like)} modules: run the recipe again to rebuild it"
        )
    return {name: (tensors[_key(name, "A")], tensors[_key(name, "B")]) for name in like}


def _in_file(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """Tensors as peft names them in a file."""
    return {
        _key(name, which): tensor
        for name, pair in pairs.items()
        for which, tensor in zip("AB", pair, strict=True)
    }


def _key(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


def _weight_of(model: PreTrainedModel, module: str) -> torch.nn.Parameter:
    """The weight of a linear layer."""
    found = model.get_submodule(module).weight
    assert isinstance(found, torch.nn.Parameter)
    return found


@dataclass(frozen=True, slots=True)
class _Adapted:
    """One module's weight, or this rank's rows of it, and what it is made of.

    weight: what computes [rows, in]; base: W0 of these rows; a: [r, in]; b: [out, r], of which
    b_rows belong to the rows.
    """

    weight: torch.Tensor
    base: torch.Tensor | NF4
    a: torch.Tensor
    b: torch.Tensor
    b_rows: slice


class Adapters:
    """A and B of a model as `engine.masters.Masters`, the same on every rank.

    The model is `prepare_adapters`'s, with W0 in float32, and sharded by now where it is to be. If
    not, it is cast to `dtype` and moved to `device` here. W0 is kept beside, in the format that
    computes or in NF4; A and B are float32 (or wider, as the model is).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: AdapterStart,
        *,
        dtype: torch.dtype,
        device: torch.device,
        world: World = SOLO,
    ) -> None:
        self._start, self._world, self._device = start, world, device
        settings, pairs = start.settings, start.pairs
        self._scale = settings.alpha / settings.rank
        self._is_sharded = is_sharded(model)
        if self._is_sharded and settings.base == "nf4":
            raise StageError(
                f"lora.base: nf4 on {world.size} ranks: blocks of 64 quantised weights would be "
                "cut by rank; expected one process: set base: full"
            )
        self._params = [_weight_of(model, name) for name in pairs]
        kept = [self._base(param, dtype) for param in self._params]
        if not self._is_sharded:
            for param in model.parameters():
                param.data = param.data.to(device, dtype)
            model.to(device)  # buffers, which stay float32
        self._adapted = [
            self._adapt(param, base, pair)
            for param, base, pair in zip(self._params, kept, pairs.values(), strict=True)
        ]
        self.names = [f"{name}.lora_{which}" for name in pairs for which in "AB"]
        self.masters = [tensor for one in self._adapted for tensor in (one.a, one.b)]
        self.copies, self.is_spread = self.masters, False
        self._sums: list[torch.Tensor | None] = [None] * len(self.masters)
        if not self._is_sharded:
            for place, param in enumerate(self._params):
                param.register_post_accumulate_grad_hook(partial(self._project, place))
        self.changed()

    def _base(self, param: torch.nn.Parameter, dtype: torch.dtype) -> torch.Tensor | NF4:
        if self._start.settings.base == "nf4":
            return NF4(param.detach().to(self._device))
        own = local_part(param.detach())  # float32, where it is sharded
        return own.clone() if self._is_sharded else own.to(self._device, dtype, copy=True)

    def _adapt(self, param: torch.nn.Parameter, base: torch.Tensor | NF4, pair: Pair) -> _Adapted:
        weight = local_part(param.detach())
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (tensor.to(weight.device, wide, copy=True) for tensor in pair)
        each = -(-len(b) // self._world.size) if self._is_sharded else len(b)
        first = each * self._world.rank if self._is_sharded else 0
        return _Adapted(weight, base, a, b, slice(first, first + len(weight)))

    @torch.no_grad()
    def _project(self, place: int, param: torch.Tensor) -> None:
        """Add what the gradient of a weight says of its A and B, and drop it."""
        if param.grad is None:
            return
        one, grad = self._adapted[place], local_part(param.grad)
        param.grad = None
        grad = grad.to(one.a.dtype)
        found = self._sums[2 * place : 2 * place + 2]
        grad_a, grad_b = (
            torch.zeros_like(master) if total is None else total
            for total, master in zip(found, (one.a, one.b), strict=True)
        )
        grad_a.addmm_(one.b[one.b_rows].T, grad, alpha=self._scale)
        grad_b[one.b_rows].addmm_(grad, one.a.T, alpha=self._scale)
        self._sums[2 * place : 2 * place + 2] = [grad_a, grad_b]

    def collect(self) -> None:
        """Nothing to do: gradients are projected and added as they come."""

    def gradients(self) -> list[torch.Tensor | None]:
        """Sums over micro-batches; of a sharded model over ranks too, each having its rows."""
        if self._is_sharded:
            for place, param in enumerate(self._params):
                self._project(place, param)
            flat = torch.cat(
                [
                    (torch.zeros_like(master) if total is None else total).flatten()
                    for total, master in zip(self._sums, self.masters, strict=True)
                ]
            )
            self._world.add(flat)
            parts = flat.split([master.numel() for master in self.masters])
            self._sums = [p.view_as(m) for p, m in zip(parts, self.masters, strict=True)]
        return list(self._sums)

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self._sums = [None] * len(self.masters)
        for param in self._params:
            param.grad = None

    @torch.no_grad()
    def changed(self) -> None:
        """Make the weights that compute: W0 + s B A, in float32 before it is rounded."""
        for one in self._adapted:
            base = one.base.whole() if isinstance(one.base, NF4) else one.base
            one.weight.copy_(_merged(base, one.a, one.b[one.b_rows], self._scale))

    def to_save(self, column: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors themselves, whole: ranks have the same."""
        return dict(zip(self.names, column, strict=True))

    def finished(self, model: PreTrainedModel, *, keep: bool) -> PreTrainedModel | None:
        """W0 read again in float32 with A and B merged in, on the CPU; `model` is as it was."""
        if not keep:
            return None
        whole = load_model(self._start.base_dir, dtype=torch.float32)
        with torch.no_grad():
            for name, (a, b) in self._pairs().items():
                weight = _weight_of(whole, name)
                base = weight.detach()
                if self._start.settings.base == "nf4":
                    base = NF4(base.to(self._device)).whole().cpu()
                weight.copy_(_merged(base, a, b, self._scale))
        return whole

    def save(self, folder: Path, base_name: str) -> None:
        """Write A and B as peft reads them, relative to the model that is called `base_name`."""
        folder.mkdir(parents=True, exist_ok=True)
        modules = sorted({name.rpartition(".")[2] for name in self._start.pairs})
        config = _peft_config(
            self._start.settings, modules, base_model_name_or_path=base_name, inference_mode=True
        )
        config.save_pretrained(str(folder))
        settings = folder / "adapter_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        values["target_modules"] = modules  # of a set, in no order
        settings.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(_in_file(self._pairs()), folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / _WEIGHTS).chmod(settings.stat().st_mode)  # not 0600, whatever the umask says

    def _pairs(self) -> dict[str, Pair]:
        """A and B by module, in float32 on the CPU."""
        return {
            name: (one.a.float().cpu(), one.b.float().cpu())
            for name, one in zip(self._start.pairs, self._adapted, strict=True)
        }


def _merged(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W0 + scale * B A, in the format of A and B."""
    return torch.addmm(base.to(a.dtype), b, a, alpha=scale)
