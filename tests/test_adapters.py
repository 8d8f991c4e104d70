"""Low-rank adapters: peft's own gradients, steps and files, resumed and on two ranks."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwater.config.lora import LoRA
from headwater.config.stages import GRPOStage, KLPenalty, SFTStage
from headwater.engine.adapters import Adapters, prepare_adapters
from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.nf4 import NF4
from headwater.engine.packing import PackedGroup, micro_batches, pack
from headwater.engine.update import StepResult, Updater
from headwater.errors import StageError
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.models.loading import load_model
from headwater.models.saving import save_model
from headwater.models.tiny import tiny_model, tiny_tokenizer
from headwater.types import LossSums
from rank_runs import Part, run_on_ranks
from stage_jobs import Run, make_job, make_model

peft = pytest.importorskip("peft")

LORA = LoRA(rank=4)
STAGE = SFTStage(lr=1e-2, schedule="linear", warmup_steps=1, weight_decay=0.1, grad_clip=1e9)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(tiny_model("student", 0), tiny_tokenizer(), folder)
    return folder


class _Ours:
    """A model in the engine that is trained through adapters."""

    def __init__(self, base: Path, lora: LoRA = LORA, dtype: torch.dtype = torch.float32) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.model = load_engine_model(base, wide, CPU)
        start = prepare_adapters(self.model, lora, base, seed=7)
        self.dtype = dtype
        self.adapters = Adapters(self.model, start, dtype=dtype, device=CPU)
        self.updater = Updater(self.model, STAGE, 4, dtype, trained=self.adapters)

    def step(self, groups: list[PackedGroup], budget: int = 10_000) -> StepResult:
        micros = [functools.partial(self._loss, one) for one in micro_batches(groups, budget)]
        return self.updater.step(micros, float(sum(len(g.completions[0]) for g in groups)))

    def _loss(self, micro: tuple[PackedGroup, ...]) -> LossSums:
        batch = pack(micro, dtype=self.dtype, device=CPU)
        hidden = hidden_at_targets(self.model, batch)
        ones = torch.ones(len(batch.target_ids_T))
        return chunked_head_loss(
            hidden, head_weight(self.model), cross_entropy(batch.target_ids_T, ones)
        )

    def named(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.adapters.names, self.adapters.masters, strict=True))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


class _Pefts:
    """The same model with the same A and B, trained by peft and torch."""

    def __init__(self, base: Path, ours: _Ours, dtype: torch.dtype) -> None:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        self.model = peft.get_peft_model(load_model(base, dtype=dtype), config)
        self.named = {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): p
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        assert self.named.keys() == ours.named().keys()
        with torch.no_grad():
            for name, tensor in ours.named().items():
                self.named[name].copy_(tensor)
        self.optimizer = torch.optim.AdamW(
            self.named.values(), betas=STAGE.betas, weight_decay=STAGE.weight_decay
        )

    def logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0]

    def step(self, groups: list[PackedGroup], rate: float) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for group in groups:
            prompt, answer = group.prompt_ids, group.completions[0]
            logprobs = self.logits(prompt + answer).log_softmax(-1)[len(prompt) - 1 : -1]
            total = total - logprobs.gather(1, torch.tensor(answer)[:, None]).sum()
            count += len(answer)
        (total / count).backward()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return {name: p.grad for name, p in self.named.items()}


def _groups(seed: int = 0) -> list[PackedGroup]:
    rng = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 60) for _ in range(rng.randint(2, most)))

    return [PackedGroup(ids(6), (ids(15),), (row,)) for row in range(6)]


def test_gradients_and_steps_are_pefts(base: Path) -> None:
    """In float64, but for the library's norms, which are float32 whatever the model is."""
    ours = _Ours(base, dtype=torch.float64)
    pefts = _Pefts(base, ours, torch.float64)
    before = ours.weights()
    for step, rate in enumerate((1e-2, 1e-2, 7e-3, 4e-3)):
        result = ours.step(_groups(step), budget=40)
        grads = pefts.step(_groups(step), rate)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-7)
        for name, tensor in ours.named().items():
            torch.testing.assert_close(tensor, pefts.named[name], rtol=1e-5, atol=1e-7, msg=name)
    means = ours.updater.state()
    for place, name in enumerate(pefts.named):
        theirs = pefts.optimizer.state[pefts.named[name]]["exp_avg"]
        torch.testing.assert_close(
            means[f"exp_avg/{name}"], theirs, rtol=1e-5, atol=1e-8, msg=f"{place} {name}"
        )
    after, adapted = ours.weights(), {n.rpartition(".")[0] + ".weight" for n in ours.named()}
    assert {n for n in before if not torch.equal(before[n], after[n])} == adapted
    assert len(adapted) == 7 * len(ours.model.get_decoder().layers)
    batch = pack(_groups()[:1], dtype=torch.float64, device=CPU)
    logits = hidden_at_targets(ours.model, batch) @ head_weight(ours.model).T
    (prompt, (answer,)) = _groups()[0].prompt_ids, _groups()[0].completions
    torch.testing.assert_close(
        logits, pefts.logits(prompt + answer)[len(prompt) - 1 : -1], rtol=1e-5, atol=2e-6
    )


def test_no_gradient_of_a_weight_outlives_its_projection(base: Path) -> None:
    ours = _Ours(base)
    alive: list[int] = []
    for param in ours.model.parameters():
        if param.requires_grad:  # called after the adapters' own hook
            param.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in ours.model.parameters()))
            )
    ours.step(_groups())
    assert len(alive) == len(ours.adapters.names) // 2
    assert max(alive) == 0


def test_micro_batches_change_nothing_beyond_rounding(base: Path) -> None:
    whole, cut = _Ours(base), _Ours(base)
    assert whole.step(_groups()).grad_norm == pytest.approx(
        cut.step(_groups(), budget=1).grad_norm, rel=1e-5
    )
    for name, tensor in whole.updater.state().items():
        if name.startswith("exp_avg/"):
            other = cut.updater.state()[name]
            scale = float(tensor.abs().max())
            torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_bfloat16_computes_with_rounded_sums_of_float32(base: Path) -> None:
    ours = _Ours(base, dtype=torch.bfloat16)
    ours.step(_groups())
    name = "model.layers.0.mlp.down_proj"
    weight = ours.model.get_submodule(name).weight
    a, b = ours.named()[f"{name}.lora_A"], ours.named()[f"{name}.lora_B"]
    assert weight.dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32
    assert float(b.abs().max()) > 0
    first = load_model(base, dtype=torch.bfloat16).get_submodule(name).weight.float()
    assert torch.equal(weight, (torch.addmm(first, b, a, alpha=2.0)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_adapter_are_the_merged_model(
    base: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = _Ours(base, LoRA(rank=2, alpha=6, target_modules=["q_proj", "down_proj"]), dtype)
    for seed in range(3):
        ours.step(_groups(seed))
    merged = ours.adapters.finished(ours.model, keep=True)
    assert merged is not None and ours.adapters.finished(ours.model, keep=False) is None
    ours.adapters.save(tmp_path, "some/base")
    for _ in range(2):  # read twice: merging leaves the base on disk as it is
        whole = peft.PeftModel.from_pretrained(load_model(base, dtype=torch.float32), tmp_path)
    ids = torch.tensor([[9, 8, 7, 11, 30]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
        start = load_model(base, dtype=torch.float32)(ids).logits
        assert float((start - merged(ids).logits).abs().max()) > 0.05
    if dtype == torch.float32:
        for name, weight in merged.named_parameters():
            assert torch.equal(weight, ours.weights()[name]), name
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    kept = ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "peft_type")
    assert [config[key] for key in kept] == ["some/base", 2, 6, ["down_proj", "q_proj"], "LORA"]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    numbers = sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert (
        numbers
        == sum(m.numel() for m in ours.adapters.masters)
        < 0.1 * sum(p.numel() for p in merged.parameters())
    )


def test_the_seed_decides_a_and_b_starts_at_zero(base: Path) -> None:
    def drawn(seed: int) -> dict[str, Any]:
        state = torch.get_rng_state()
        model = load_engine_model(base, torch.float32, CPU)
        found = prepare_adapters(model, LORA, base, seed).pairs
        assert torch.equal(state, torch.get_rng_state())
        return dict(found)

    one, same, other = drawn(1), drawn(1), drawn(2)
    for name, (a, b) in one.items():
        assert torch.equal(a, same[name][0]) and not torch.equal(a, other[name][0])
        assert not b.any()
        assert float(a.abs().max()) <= a.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)


def test_a_target_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(
        Phi3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
            pad_token_id=0,
        )
    )
    lora = LoRA(target_modules=["q_proj", "o_proj"])
    with pytest.raises(StageError, match=r"\['q_proj'\]: Phi3.* has no such .*use all-linear"):
        prepare_adapters(model, lora, tmp_path, 0)
    assert len(prepare_adapters(model, LORA, tmp_path, 0).pairs) == 4  # its own fused linears


# --- NF4 ------------------------------------------------------------------------------------------


def test_an_nf4_base_is_what_bitsandbytes_loads(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ours = _Ours(base, LoRA(rank=4, base="nf4"))
    ours.step(_groups())
    merged = ours.adapters.finished(ours.model, keep=True)
    assert merged is not None
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, ours.weights()[name]), name
    ours.adapters.save(tmp_path, "some/base")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantised, dtype=torch.float32, device_map="cpu"
    )
    whole = peft.PeftModel.from_pretrained(loaded, tmp_path).train()  # not its bfloat16 kernel
    ids = torch.tensor([[9, 8, 7, 11, 30]])
    with torch.no_grad():
        found = merged(ids).logits
        torch.testing.assert_close(whole(ids).logits, found, rtol=1e-4, atol=1e-4)
        plain = peft.PeftModel.from_pretrained(load_model(base, dtype=torch.float32), tmp_path)
        assert float((plain(ids).logits - found).abs().max()) > 0.02  # quantising is no small thing


def test_nf4_takes_half_a_byte_and_a_scale_for_64() -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 64)
    kept = NF4(weight)
    assert kept.bytes == 96 * 64 // 2 + 96 * 4
    error = (kept.whole() - weight).abs().max(1).values / weight.abs().max(1).values
    assert 0 < float(error.max()) < 0.16  # half the widest gap between NF4's levels
    assert torch.equal(NF4(kept.whole()).whole(), kept.whole())


# --- stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=150)


Make = Callable[..., Run]


@pytest.fixture
def grpo(student: Path, tmp_path: Path) -> Make:
    """A GRPO stage with adapters; by default a first one, from the student."""

    def made(name: str, model_dir: Path = student, **changes: Any) -> Run:
        config = GRPOStage(
            **{
                "steps": 3,
                "prompts_per_step": 3,
                "group_size": 4,
                "lr": 5e-3,
                "kl": KLPenalty(coefficient=1e-3),
                "lora": {"rank": 2},
            }
            | changes
        )
        job = make_job(
            "grpo",
            config,
            tmp_path / name,
            seed=6,
            model_dir=model_dir,
            # where a run says neither, adapters are relative to the model that they begin with
            base_dir=student if model_dir != student else None,
            options={"base_name": "artifacts/base/model"} if model_dir != student else {},
        )
        return Run(job, labels=True)

    return made


def _adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.job.output_dir / "adapter" / "adapter_model.safetensors")


def _base_name(run: Run) -> str:
    config = (run.job.output_dir / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    return str(json.loads(config)["base_model_name_or_path"])


def _shift(run: Run, student: Path) -> torch.Tensor:
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (student, run.model_dir))
    return after - before


def test_a_stage_leaves_the_merged_model_and_the_adapter(grpo: Make, student: Path) -> None:
    run = grpo("one").start()
    tensors = _adapter(run)
    assert _base_name(run) == str(student)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    product = 2 * tensors[key.format("B")] @ tensors[key.format("A")]
    assert float(product.abs().max()) > 1e-3
    torch.testing.assert_close(_shift(run, student), product, rtol=0, atol=1e-6)
    before, after = (load_file(f / "model.safetensors") for f in (student, run.model_dir))
    norm = "model.norm.weight"
    assert torch.equal(before[norm], after[norm])
    in_full = grpo("full", lora=False).start()
    assert not (in_full.job.output_dir / "adapter").exists()
    assert run.metrics()[0]["reward"] == in_full.metrics()[0]["reward"]  # the same first rollouts


def test_the_next_stage_goes_on_with_the_same_adapter(grpo: Make, student: Path) -> None:
    first = grpo("first").start()
    second = grpo("second", first.model_dir).start()
    tensors = _adapter(second)
    assert tensors.keys() == _adapter(first).keys()
    assert _base_name(second) == "artifacts/base/model"
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    assert torch.linalg.matrix_rank(_shift(second, student), tol=1e-5) == 2  # one adapter, not two
    torch.testing.assert_close(
        _shift(second, student),
        2 * tensors[key.format("B")] @ tensors[key.format("A")],
        rtol=0,
        atol=1e-6,
    )
    kl = [row["reference_kl"] for row in second.metrics()]
    assert abs(kl[0]) < 1e-6 < kl[-1]  # it begins where the first ended
    with pytest.raises(StageError, match="not the adapters that this stage goes on with"):
        grpo("third", first.model_dir, lora={"rank": 3}).start()


def test_a_resumed_stage_equals_a_straight_one(grpo: Make) -> None:
    straight = grpo("straight").start()
    run = grpo("stopped").interrupted_at(2)
    (saved,) = run.job.checkpoint_dir.glob("steps/*/tensors.safetensors")
    names = {name.partition("/")[2] for name in load_file(saved)} - {""}
    assert names and all(name.endswith((".lora_A", ".lora_B")) for name in names)
    run.start().assert_equals(straight)
    ours, theirs = _adapter(run), _adapter(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_three_ranks_change_nothing_beyond_rounding(grpo: Make, tmp_path: Path) -> None:
    alone = grpo("alone").start()
    together = grpo("together")  # rows of a weight are cut unevenly
    run_on_ranks([Part(together, stop_at=1), Part(together)], 3, tmp_path / "ranks")
    for ours, theirs in zip(alone.metrics(), together.metrics(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    expected, found = _adapter(alone), _adapter(together)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # as a whole: AdamW makes a step of a single gradient near zero, which rounding moves
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name
