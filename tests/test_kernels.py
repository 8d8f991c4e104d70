"""The compiled kernels: torch's numbers, whatever the batch; and how one does without them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater import doctor
from headwater.engine import decoder
from headwater.engine import kernel_build as build
from headwater.engine import kernel_calls as calls
from headwater.engine.decoder import decoder_of
from headwater.engine.decoding import DecodeLayout
from headwater.engine.kernel_calls import Kernels, kernels_for
from headwater.engine.packing import pack_prompts
from headwater.engine.recording import RecordedForward
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from test_engine_layers import FAMILIES, VOCAB, _family, _ours, _plain_gradients
from test_recording import ENDS, ROOM, _gradients, _groups

FORMATS = [torch.float32, torch.bfloat16]
#: Largest difference from float64, as a share of the largest value.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=FORMATS, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if build.built(found).library is None:
        pytest.skip(f"no kernels for {found} here: {build.built(found).why}")
    return found


@pytest.fixture
def kernels(dtype: torch.dtype) -> Kernels:
    found = kernels_for(torch.zeros(2, 2, dtype=dtype))
    assert found is not None
    return found


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")


# --- products -----------------------------------------------------------------------------------


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("rows", [*range(1, 18), 300])
@pytest.mark.parametrize(("inner", "columns"), [(2, 1), (34, 16), (48, 37), (700, 130)])
def test_products_are_those_of_float64(
    kernels: Kernels, dtype: torch.dtype, rows: int, inner: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(rows)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    wide, weight, plus = drawn(rows, inner + 6), drawn(columns, inner), drawn(rows, columns + 3)
    bias = torch.randn(columns, generator=generator)
    packed = kernels.pack(weight)
    for x in (wide[:, :inner], wide[:, 4 : 4 + inner], drawn(inner, rows).T):
        exact = x.double() @ weight.double().T
        expected: list[tuple[dict[str, Any], torch.Tensor]] = [
            ({}, exact),
            ({"bias": bias}, exact + bias.double()),
            ({"plus": plus[:, :columns]}, exact + plus[:, :columns].double()),
        ]
        for more, result in expected:
            found = kernels.linear(x, packed, columns, **more)
            assert found.dtype == dtype
            assert _off(found, result) < CLOSE[dtype]


def test_what_is_no_number_stays_none(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 4, dtype=dtype)
    x = torch.ones(4, 4, dtype=dtype)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    found = kernels.linear(x, kernels.pack(weight), 3)
    assert found[[0, 3]].eq(4).all()
    assert found[1].isnan().all()
    assert found[2].isposinf().all()


# --- steps --------------------------------------------------------------------------------------


def _requests(count: int = 5) -> list[SampleRequest]:
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))) for _ in range(count)]
    return [
        SampleRequest(ids, tuple(10 * p + s for s in range(1 + p % 3)))
        for p, ids in enumerate(prompts)
    ]


def _final_states(model: Any, rows: list[int], steps: int = 40) -> Iterator[torch.Tensor]:
    """The final states [B, H] of steps of these rows of six, two to a prompt, on fixed tokens."""
    prompts = [(5, 6, 7), (8, 9, 10, 11, 12), (13,)]
    with torch.inference_mode():
        made = decoder_of(model, VOCAB)
        ids, positions, layout, _ = pack_prompts(prompts, dtype=model.dtype, device="cpu")
        made.prefill(ids[0], positions[0], layout)
        assert layout.capture is not None
        lengths = [len(prompt) for prompt in prompts]
        of_rows = torch.tensor([row // 2 for row in rows])
        cache = DecodeLayout(layout.capture, lengths, of_rows)
        positions_B = torch.tensor(lengths)[of_rows]
        for step in range(steps):
            tokens = torch.tensor([(step * 7 + 5 * row) % VOCAB for row in rows])
            yield made.step(tokens, positions_B + step, cache)
            cache.advance()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_as_close_to_float64_as_torchs(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, rows = _family(family, dtype), [0, 1, 2, 4, 5]
    exact = list(_final_states(_ours(plain).double(), rows))
    found = list(_final_states(_ours(plain), rows))
    monkeypatch.setenv(build.SWITCH, "0")
    torchs = list(_final_states(_ours(plain), rows))
    ours, theirs = (
        sum(float((a.double() - b).square().mean()) for a, b in zip(side, exact, strict=True))
        for side in (found, torchs)
    )
    assert 0 < ours < 1.5 * theirs
    assert not torch.equal(found[-1], torchs[-1])  # both were really computed


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_row_is_the_same_to_the_bit_in_every_batch(family: str, dtype: torch.dtype) -> None:
    model = _ours(_family(family, dtype))
    together = list(_final_states(model, [0, 1, 2, 3, 4, 5]))
    threads = torch.get_num_threads()
    for others in ([0], [0, 1], [1, 2, 5]):
        for a, b in zip(_final_states(model, others), together, strict=True):
            assert torch.equal(a, b[others])
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = list(_final_states(model, [0, 1, 2, 3, 4, 5]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


@pytest.mark.parametrize("max_rows", [512, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_on_what_the_kernels_recorded(
    family: str, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that leave and enter, groups left out, completions cut."""
    if build.built(torch.float32).library is None:
        pytest.skip(build.built(torch.float32).why)
    monkeypatch.setattr(decoder, "SMALLEST_RECORDED", 1)
    plain = _family(family, torch.float64)
    model = _ours(plain).float()
    recorded = RecordedForward(ROOM)
    sampler = InProcessSampler(model, SamplerSettings(1.0, 30, ENDS, VOCAB), max_rows=max_rows)
    groups = _groups(sampler.sample(_requests(), recorded), random.Random(3))
    found = _gradients(model, groups, recorded, ROOM)
    assert recorded.was_read
    for name, exact in _plain_gradients(plain, groups).items():
        scale = float(exact.abs().max())
        torch.testing.assert_close(
            found[name].double(), exact, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


# --- doing without ------------------------------------------------------------------------------


def test_the_switch_leaves_all_to_torch(no_kernels: None) -> None:
    assert build.built(torch.float32) == build.Built(None, "HEADWATER_KERNELS=0")
    assert kernels_for(torch.zeros(2, 2)) is None


@pytest.mark.parametrize("weight", [torch.zeros(4, 4).double(), torch.zeros(4, 4).half()])
def test_other_formats_are_left_to_torch(weight: torch.Tensor) -> None:
    assert kernels_for(weight) is None


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet; returns the cache's folder."""
    if build.built(torch.float32).library is None:
        pytest.skip(build.built(torch.float32).why)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._built.cache_clear()
    yield tmp_path / "headwater" / "kernels"
    build._built.cache_clear()
    calls._kernels.cache_clear()


def test_what_was_compiled_is_kept(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.built(torch.float32)
    assert first.library is not None and "compiled with" in first.why
    (kept,) = afresh.iterdir()
    written = kept.stat().st_mtime_ns
    build._built.cache_clear()
    monkeypatch.setattr(build.subprocess, "run", None)  # nothing is compiled again
    assert build.built(torch.float32).library is not None
    assert kept.stat().st_mtime_ns == written


def test_a_cache_that_cannot_be_written_is_done_without(afresh: Path) -> None:
    afresh.parent.parent.mkdir(exist_ok=True)
    afresh.parent.write_text("a file where the folder should be")
    assert build.built(torch.float32).library is not None


def test_without_a_compiler(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.built(torch.float32) == build.Built(None, build.NO_COMPILER, failed=True)
    line = doctor._kernels()
    assert line.health is doctor.Health.NOTE and "install a C compiler" in line.cure


@pytest.mark.usefixtures("kernels")
def test_they_are_worth_their_while(dtype: torch.dtype) -> None:
    """A compiler that keeps vectors in memory makes them fifteen times slower than torch: it has
    happened, and no other test saw it. The best of several goes, since others may compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert max(calls.beside_torch(dtype) or 0.0 for _ in range(5)) > 0.5
    finally:
        torch.set_num_threads(threads)


def test_the_doctor_says_how_fast_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_built", lambda dtype: build.Built(object(), "compiled"))  # type: ignore[arg-type]
    for speed, said in ((1.4, "compiled, 1.4 times torch's speed"), (0.3, "0.3 times")):
        monkeypatch.setattr(calls, "beside_torch", lambda dtype, speed=speed: speed)
        line = doctor._kernels()
        assert said in line.found
        assert (line.health is doctor.Health.OK) == (speed > 1)
        assert ("HEADWATER_KERNELS=0" in line.cure) == (speed < 1)


def test_where_they_can_be_compiled_they_are() -> None:
    """Or else every test here would be skipped and none fail."""
    for dtype in FORMATS:
        found = build.built(dtype)
        assert not found.failed or found.why == build.NO_COMPILER


def test_input_of_another_format_or_width_is_refused(kernels: Kernels, dtype: torch.dtype) -> None:
    packed = kernels.pack(torch.zeros(20, 6, dtype=dtype))
    for x in (torch.zeros(2, 8, dtype=dtype), torch.zeros(2, 6, dtype=torch.float64)):
        with pytest.raises(ValueError, match="same format and width"):
            kernels.linear(x, packed, 20)


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no such machine >&2; exit 1", "no such machine"), ("exit 0", "could not compile them")],
)
def test_a_compiler_that_fails(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = build.built(torch.float32)
    assert found.library is None and found.failed
    assert said in found.why
    assert str(compiler) in found.why


@pytest.mark.parametrize(
    ("cpuinfo", "dtype_", "said"),
    [
        ("vendor_id : GenuineIntel\nflags : avx2 fma avx512_bf16 amx_bf16 x", "bfloat16", "AMX"),
        ("vendor_id : GenuineIntel\nflags : avx2 fma avx512_bf16 x", "bfloat16", "no fast"),
        ("vendor_id : AuthenticAMD\nflags : avx2 fma avx512_bf16 x", "bfloat16", ""),
        ("vendor_id : AuthenticAMD\nflags : avx2 fma x", "bfloat16", "no fast"),
        ("vendor_id : AuthenticAMD\nflags : avx2 fma x", "float32", ""),
        ("vendor_id : AuthenticAMD\nflags : sse2 x", "float32", "no AVX2"),
    ],
)
def test_processors_that_have_a_use_for_them(
    cpuinfo: str, dtype_: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    found = build._unsuited(getattr(torch, dtype_))
    assert (said in found) if said else not found
