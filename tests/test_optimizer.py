"""AdamW in slices beside torch's own, whatever the slices and formats."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from headwater.engine import optimizer
from headwater.engine.optimizer import SlicedAdamW

_SHAPES = ((7, 5), (3,), (40, 11), (1,), (64,))
_SETTINGS = {"betas": (0.8, 0.95), "weight_decay": 0.1}


def _tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in _SHAPES]


def _theirs(gradients: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    weights = [w.requires_grad_(True) for w in _tensors(0)]
    adamw = torch.optim.AdamW(weights, lr=0.01, fused=True, **_SETTINGS)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.float() * 0.5
        adamw.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize("limit", [1, 10, 64, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_show_in_no_number(
    limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimizer._SLICE_ELEMENTS, "cpu", limit)
    masters = _tensors(0)
    copies = masters if dtype == torch.float32 else [m.to(dtype) for m in masters]
    ours = SlicedAdamW(masters, copies, **_SETTINGS)
    gradients = [_tensors(seed, dtype) for seed in (1, 2, 3)]
    norm = torch.cat([g.float().flatten() for g in gradients[0]]).norm()
    assert ours.norm(gradients[0]) == pytest.approx(float(norm), rel=1e-6)
    for step in gradients:
        ours.step([g.clone() for g in step], 0.01, 0.5)
    for found, copy, expected in zip(masters, copies, _theirs(gradients), strict=True):
        # the ends of a slice are computed without vectors, which rounds some last bits otherwise
        torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(copy, found.to(dtype))


def test_a_weight_without_a_gradient_stays() -> None:
    masters = _tensors(0)
    ours = SlicedAdamW(masters, masters, **_SETTINGS)
    gradients: list[torch.Tensor | None] = [*_tensors(1)]
    gradients[2] = None
    ours.step(gradients, 0.01, 1.0)
    untouched = [torch.equal(m, before) for m, before in zip(masters, _tensors(0), strict=True)]
    assert untouched == [False, False, True, False, False]


def test_no_gradient_at_all_has_no_norm() -> None:
    masters = _tensors(0)
    assert SlicedAdamW(masters, masters, **_SETTINGS).norm([None] * len(masters)) == 0.0
