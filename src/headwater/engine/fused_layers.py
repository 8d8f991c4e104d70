"""Decoder layers of the Llama family with a backward pass by hand.

The library's layer makes some fifty tensors a pass and keeps most of them for autograd. Here a
layer keeps what its gradient cannot do without (its input, queries, keys, values, what attention
read, the middle of the layer, gate and up) and makes the rest again; everything else is done in
place. The mathematics and the parameters are the library's: its module stays, only its `forward`
is replaced, and layers of any other structure are left alone.

T tokens; H hidden; D head dimension; others as in `headwater.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from headwater.engine.attention import attend, attend_backward
from headwater.engine.layout import PackedLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Layers whose structure is norm, attention, norm, gated SiLU, each with a residual around it.
_KNOWN_LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Weights of one layer; biases and per-head norms where the family has them."""

    norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    def all(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Numbers of one layer that are not weights."""

    head_dim: int
    scaling: float
    eps: float


def parameters_of(layer: nn.Module) -> LayerParameters | None:
    """The weights of a layer of known structure; None for any other.

    Another structure is also one with adapters on it, or with a sliding window, which the engine's
    attention refuses when the library calls it.
    """
    if type(layer).__name__ not in _KNOWN_LAYERS:
        return None
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if _window_of(layer) is not None:
        return None
    q, k, v, o = (attention.get_submodule(f"{name}_proj") for name in "qkvo")
    gate, up, down = (mlp.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
    if any(type(linear) is not nn.Linear for linear in (q, k, v, o, gate, up, down)):
        return None
    if any(linear.bias is not None for linear in (o, gate, up, down)):
        return None
    if type(mlp.get_submodule("act_fn")).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    return LayerParameters(
        norm=_tensor(layer.get_submodule("input_layernorm").weight),
        q=_tensor(q.weight),
        k=_tensor(k.weight),
        v=_tensor(v.weight),
        o=_tensor(o.weight),
        mlp_norm=_tensor(layer.get_submodule("post_attention_layernorm").weight),
        gate=_tensor(gate.weight),
        up=_tensor(up.weight),
        down=_tensor(down.weight),
        q_bias=_optional(q.bias),
        k_bias=_optional(k.bias),
        v_bias=_optional(v.bias),
        q_norm=_head_norm(attention, "q_norm"),
        k_norm=_head_norm(attention, "k_norm"),
    )


def _window_of(layer: nn.Module) -> int | None:
    """The sliding window a layer attends in; Mistral's layers have it in their config alone."""
    attention: Any = layer.get_submodule("self_attn")
    owner = attention.config if type(layer).__name__ == "MistralDecoderLayer" else attention
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def _head_norm(attention: nn.Module, name: str) -> torch.Tensor | None:
    return _tensor(attention.get_submodule(name).weight) if hasattr(attention, name) else None


def _tensor(found: Any) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found


def _optional(found: Any) -> torch.Tensor | None:
    return None if found is None else _tensor(found)


def shape_of(layer: nn.Module) -> LayerShape:
    """Head dimension, scale of the scores and epsilon of the norms of a known layer."""
    attention: Any = layer.get_submodule("self_attn")
    norm: Any = layer.get_submodule("input_layernorm")
    return LayerShape(
        head_dim=int(attention.head_dim),
        scaling=float(attention.scaling),
        eps=float(norm.variance_epsilon),
    )


def fuse_layers(model: PreTrainedModel) -> int:
    """Replace the forward of every decoder layer of known structure; returns how many.

    Called without a `layout` (outside the engine) a layer computes as the library wrote it.
    """
    count = 0
    for number, layer in enumerate(model.get_decoder().layers):
        if parameters_of(layer) is not None:
            layer.forward = _forward_of(layer, number, layer.forward)
            count += 1
    return count


def _forward_of(
    layer: nn.Module, number: int, original: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    shape = shape_of(layer)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        weights, layout = parameters_of(layer), kwargs.get("layout")
        if weights is None or not isinstance(layout, PackedLayout):
            result: torch.Tensor = original(hidden_states, **kwargs)
            return result
        rotary = rotary_of(kwargs["position_embeddings"], shape.head_dim)
        flat = hidden_states[0]
        if torch.is_grad_enabled():
            known: Known | None = kwargs.get("known")
            done = None if known is None else known(number)
            out = _Layer.apply(flat, rotary, layout, shape, done, *weights.all())
        else:
            out = _compute(flat, rotary, layout, shape, weights).out
        return out[None]

    return forward


#: Cosines [T, 1, D] and sines [T, 1, D/2] of the positions.
Rotary = tuple[torch.Tensor, torch.Tensor]


def rotary_of(tables: tuple[torch.Tensor, torch.Tensor], head_dim: int) -> Rotary:
    """From the library's cosines and sines [1, T, D], whose halves are equal."""
    cos, sin = tables
    if cos.shape[-1] != head_dim:
        raise ValueError(f"rotary tables of {cos.shape[-1]} for heads of {head_dim}")
    return cos[0, :, None], sin[0, :, None, : head_dim // 2]


@dataclass(frozen=True, slots=True)
class LayerForward:
    """A layer's forward pass over T tokens: the result and what the backward pass reads."""

    out: torch.Tensor  # [T, H]
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rotated, as attention saw them
    raw: tuple[torch.Tensor, torch.Tensor] | None  # queries and keys before their norms
    read: torch.Tensor  # [T, heads * D]
    middle: torch.Tensor  # [T, H], after attention's residual
    gate: torch.Tensor
    up: torch.Tensor


#: A layer's forward pass by its number, where it need not be computed again.
Known = Callable[[int], LayerForward]


def _project_qkv(
    x: torch.Tensor, rotary: Rotary, shape: LayerShape, weights: LayerParameters
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated q [T, heads, D] and k, v [T, M, D] of a layer's input, and raw q and k."""
    normed = rms_norm(x, weights.norm, shape.eps)
    raw_q, raw_k, v = (
        functional.linear(normed, weight, bias).view(x.shape[0], -1, shape.head_dim)
        for weight, bias in (
            (weights.q, weights.q_bias),
            (weights.k, weights.k_bias),
            (weights.v, weights.v_bias),
        )
    )
    q = raw_q if weights.q_norm is None else rms_norm(raw_q, weights.q_norm, shape.eps)
    k = raw_k if weights.k_norm is None else rms_norm(raw_k, weights.k_norm, shape.eps)
    return rotate(q, rotary), rotate(k, rotary), v, raw_q, raw_k


def _compute(
    x: torch.Tensor,
    rotary: Rotary,
    layout: PackedLayout,
    shape: LayerShape,
    weights: LayerParameters,
    keep: list[torch.Tensor] | None = None,
) -> LayerForward:
    q, k, v, raw_q, raw_k = _project_qkv(x, rotary, shape, weights)
    read = attend(layout, q, k, v, shape.scaling, keep).flatten(1)
    middle = torch.addmm(x, read, weights.o.t())
    normed = rms_norm(middle, weights.mlp_norm, shape.eps)
    gate = functional.linear(normed, weights.gate)
    up = functional.linear(normed, weights.up)
    out = torch.addmm(middle, functional.silu(gate).mul_(up), weights.down.t())
    raw = None if weights.q_norm is None else (raw_q, raw_k)
    return LayerForward(out, (q, k, v), raw, read, middle, gate, up)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rotary: Rotary,
        layout: PackedLayout,
        shape: LayerShape,
        known: LayerForward | None,
        *weights: torch.Tensor | None,
    ) -> torch.Tensor:
        attention: list[torch.Tensor] = []
        parameters = LayerParameters(*weights)  # type: ignore[arg-type]
        done = known or _compute(x, rotary, layout, shape, parameters, attention)
        ctx.rotary, ctx.layout, ctx.shape = rotary, layout, shape
        kept = (x, *done.qkv, done.read, done.middle, done.gate, done.up, *(done.raw or ()))
        ctx.save_for_backward(*weights, *kept, *attention)
        ctx.ends = (len(weights), len(weights) + len(kept))
        return done.out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        saved, (first, last) = ctx.saved_tensors, ctx.ends
        kept, attention = saved[first:last], saved[last:]
        w, eps = LayerParameters(*saved[:first]), ctx.shape.eps
        x, q, k, v, read, middle, gate, up, *raw = kept
        grads: dict[str, torch.Tensor] = {}
        normed = rms_norm(middle, w.mlp_norm, eps)
        grad_normed = _mlp_backward(grad_out, normed, gate, up, w, grads)
        grad_middle, grads["mlp_norm"] = rms_norm_backward(grad_normed, middle, w.mlp_norm, eps)
        grad_middle.add_(grad_out)
        grads["o"] = grad_middle.t() @ read
        grad_read = (grad_middle @ w.o).view(q.shape)
        grad_q, grad_k, grad_v = attend_backward(
            ctx.layout, q, k, v, ctx.shape.scaling, grad_read, attention
        )
        cos, sin = ctx.rotary
        grad_q, grad_k = rotate(grad_q, (cos, -sin)), rotate(grad_k, (cos, -sin))
        if w.q_norm is not None and w.k_norm is not None:
            grad_q, grads["q_norm"] = rms_norm_backward(grad_q, raw[0], w.q_norm, eps)
            grad_k, grads["k_norm"] = rms_norm_backward(grad_k, raw[1], w.k_norm, eps)
        normed = rms_norm(x, w.norm, eps)
        grad_normed = _qkv_backward((grad_q, grad_k, grad_v), normed, w, grads)
        grad_x, grads["norm"] = rms_norm_backward(grad_normed, x, w.norm, eps)
        grad_x.add_(grad_middle)
        none = (None,) * 4
        return grad_x, *none, *(grads.get(name) for name in LayerParameters.__slots__)


def _mlp_backward(
    grad_out: torch.Tensor,
    normed: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    w: LayerParameters,
    grads: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Gradient of the MLP's normed input; fills those of gate, up and down."""
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    product = activated * up
    grads["down"] = grad_out.t() @ product
    grad_product = grad_out @ w.down
    # silu' = sigmoid + silu (1 - sigmoid), where `product` was
    slope = torch.addcmul(activated, activated, sigmoid, value=-1.0, out=product).add_(sigmoid)
    grad_gate, grad_up = slope.mul_(up).mul_(grad_product), activated.mul_(grad_product)
    grads["gate"], grads["up"] = grad_gate.t() @ normed, grad_up.t() @ normed
    return (grad_gate @ w.gate).addmm_(grad_up, w.up)


def _qkv_backward(
    grad_qkv: Sequence[torch.Tensor],
    normed: torch.Tensor,
    w: LayerParameters,
    grads: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Gradient of attention's normed input; fills those of q, k, v and their biases."""
    total: torch.Tensor | None = None
    projections = (("q", w.q, w.q_bias), ("k", w.k, w.k_bias), ("v", w.v, w.v_bias))
    for (name, weight, bias), grad in zip(projections, grad_qkv, strict=True):
        flat = grad.flatten(1)
        grads[name] = flat.t() @ normed
        if bias is not None:
            grads[f"{name}_bias"] = flat.sum(0)
        total = flat @ weight if total is None else total.addmm_(flat, weight)
    assert total is not None
    return total


# --- the small parts ------------------------------------------------------------------------------
# Half-precision input is widened once, as a whole: mixing formats inside an operation costs torch
# a hidden copy of every operand each time.


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32; x itself where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / root mean square over the last axis, [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()


def _times(wide: torch.Tensor, factor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """wide * factor, in place where `wide` is a copy of `original`."""
    return wide * factor if wide is original else wide.mul_(factor)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square, times `weight`; x [..., H], computed in at least float32."""
    wide = widened(x)
    return _times(wide, _inverse_rms(wide, eps), x).mul_(widened(weight)).to(x.dtype)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight, given that of `rms_norm`'s result."""
    wide, wide_grad = widened(x), widened(grad)
    inverse = _inverse_rms(wide, eps)
    unit = _times(wide, inverse, x)
    grad_weight = (wide_grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
    scaled = _times(wide_grad, widened(weight), grad)
    along = torch.linalg.vecdot(scaled, unit)[..., None].div_(x.shape[-1])
    return scaled.addcmul_(unit, along, value=-1.0).mul_(inverse).to(x.dtype), grad_weight


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary positions: x [T, heads, D]; the two halves of D turn against each other."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    wide = widened(x)
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1.0)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out.to(x.dtype)
