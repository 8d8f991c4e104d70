"""Which number format `auto` stands for."""

from __future__ import annotations

import pytest
import torch

from headwater.config.compute import Compute
from headwater.engine import precision

#: vendor_id and the flags that matter, as /proc/cpuinfo of real processors has them.
INTEL_AMX = "vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16 amx_tile amx_int8"
INTEL_NO_AMX = "vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 avx512_fp16"
AMD_ZEN4 = "vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16"
AMD_ZEN2 = "vendor_id : AuthenticAMD\nflags : avx2 fma"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (INTEL_AMX, torch.bfloat16),
        (AMD_ZEN4, torch.bfloat16),
        (INTEL_NO_AMX, torch.float32),
        (AMD_ZEN2, torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_is_bfloat16_where_its_products_are_faster(
    cpuinfo: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpuinfo", lambda: cpuinfo)
    cpu = torch.device("cpu")
    assert precision.resolve_dtype(Compute(), cpu, 576) == expected
    assert precision.resolve_dtype(Compute(), cpu, 64) == torch.float32  # too small to gain
    for name in ("float32", "bfloat16"):
        asked = precision.resolve_dtype(Compute(precision=name), cpu, 64)
        assert asked == getattr(torch, name)


def test_auto_is_bfloat16_on_cuda() -> None:
    assert precision.resolve_dtype(Compute(), torch.device("cuda"), 576) == torch.bfloat16
