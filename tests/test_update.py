"""The optimiser step and checkpoints: schedules, denominators, precision, continuation."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwater.config.stages import SFTStage
from headwater.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from headwater.engine.forward import head_weight, hidden_at_targets
from headwater.engine.packing import PackedGroup, micro_batches, pack
from headwater.engine.update import Updater, learning_rate
from headwater.errors import StageError
from headwater.losses.chunked_head import chunked_head_loss
from headwater.losses.token_losses import cross_entropy
from headwater.models.tiny import tiny_model
from headwater.types import LossSums
from reference import losses as reference

# --- schedules ----------------------------------------------------------------------------------


def _rates(total: int, **settings: object) -> list[float]:
    stage = SFTStage(lr=1.0, **settings)
    return [round(learning_rate(stage, step, total), 6) for step in range(total)]


def test_schedules() -> None:
    assert _rates(4) == [1.0, 1.0, 1.0, 1.0]
    assert _rates(5, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert _rates(4, schedule="linear") == [1.0, 0.775, 0.55, 0.325]
    assert _rates(4, schedule="cosine") == [1.0, 0.868198, 0.55, 0.231802]
    assert _rates(6, schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]
    stage = SFTStage(lr=1.0, schedule="cosine")
    assert learning_rate(stage, 99, 4) == pytest.approx(0.1)  # past the end it stays at a tenth


# --- one weight ---------------------------------------------------------------------------------


class _Weights(torch.nn.Module):
    """A few numbers to train and a buffer that is no weight."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values))
        self.register_buffer("table", torch.tensor([1.001]), persistent=False)


def _pull(model: _Weights, slopes: list[float]) -> Callable[[], LossSums]:
    """A loss with these slopes, whatever the weights are."""

    def loss() -> LossSums:
        weight = model.weight.float()
        return LossSums((weight * torch.tensor(slopes)).sum(), 1.0, {"slope": (sum(slopes), 1.0)})

    return loss


def test_adamw_equals_its_equations() -> None:
    slopes = [0.3, -0.2, 0.25, 0.0, 0.5]
    settings = SFTStage(
        lr=0.01, schedule="linear", warmup_steps=1, weight_decay=0.1, betas=(0.8, 0.9)
    )
    model = _Weights([2.0])
    updater = Updater(model, settings, 5)
    rates = [learning_rate(settings, step, 5) for step in range(5)]
    for slope, rate in zip(slopes, rates, strict=True):
        result = updater.step([_pull(model, [2 * slope])], denominator=2.0)
        assert result.grad_norm == pytest.approx(abs(slope))
        assert result.metrics == {"slope": pytest.approx(2 * slope), "learning_rate": rate}
    expected = reference.adamw(2.0, slopes, rates, betas=(0.8, 0.9), weight_decay=0.1)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert updater.steps_done == 5


def test_a_skipped_update_moves_the_schedule_and_nothing_else() -> None:
    model = _Weights([1.0])
    updater = Updater(model, SFTStage(lr=0.1, schedule="linear"), 4)
    updater.skip()
    assert (model.weight.item(), updater.steps_done) == (1.0, 1)
    updater.step([_pull(model, [0.5])], 1.0)
    assert model.weight.item() == pytest.approx(1.0 - 0.0775, rel=1e-6)


def test_an_update_is_counted_before_any_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = _Weights([1.0]), []
    updater = Updater(model, SFTStage(lr=0.1), 4)
    step = updater._optimizer.step

    def noted(*arguments: object) -> None:
        seen.append((updater.steps_done, model.weight.item()))
        step(*arguments)

    monkeypatch.setattr(updater._optimizer, "step", noted)
    updater.step([_pull(model, [0.5])], 1.0)
    assert seen == [(1, 1.0)] and model.weight.item() < 1.0


@pytest.mark.parametrize("grad_clip", [0.5, 100.0])
def test_clipping_equals_torchs_own(grad_clip: float) -> None:
    slopes = [3.0, -4.0, 12.0]
    twin = torch.nn.Parameter(torch.zeros(3))
    twin.grad = torch.tensor(slopes)
    norm = torch.nn.utils.clip_grad_norm_([twin], grad_clip)
    model = _Weights([0.0, 0.0, 0.0])
    updater = Updater(model, SFTStage(lr=0.1, grad_clip=grad_clip, betas=(0.9, 0.99)), 1)
    result = updater.step([_pull(model, slopes)], 1.0)
    assert result.grad_norm == norm.item() == 13.0  # as it was before clipping
    torch.testing.assert_close(updater.state()["exp_avg/weight"], 0.1 * twin.grad)


# --- precision ----------------------------------------------------------------------------------


def test_bfloat16_keeps_float32_masters_and_loses_no_small_update() -> None:
    model = _Weights([1.0, 1.001])
    updater = Updater(model, SFTStage(lr=1e-6), 4000, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert model.table.dtype == torch.float32  # rotary tables are buffers
    (master,) = updater.masters
    assert master.tolist() == torch.tensor([1.0, 1.001]).tolist()  # not rounded to bfloat16
    updater.step([_pull(model, [1.0, 1.0])], 1.0)
    assert master[0].item() == pytest.approx(1.0 - 1e-6, abs=6e-8)
    assert model.weight[0].item() == 1.0  # bfloat16 cannot show it yet
    updater = Updater(model := _Weights([1.0]), SFTStage(lr=1e-3), 10, torch.bfloat16)
    for _ in range(5):
        updater.step([_pull(model, [1.0])], 1.0)
    assert model.weight.item() == pytest.approx(0.995, abs=0.002)  # five times half a bfloat16 ulp


def test_bfloat16_gradients_add_up_in_float32() -> None:
    model = _Weights([1.0])
    updater = Updater(model, SFTStage(lr=0.1, grad_clip=1e6, betas=(0.0, 0.9)), 1, torch.bfloat16)
    updater.step([_pull(model, [256.0]), *[_pull(model, [0.5])] * 8], 1.0)
    assert updater.state()["exp_avg/weight"].item() == 260.0  # 256 in bfloat16 sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slopes", [[float("inf"), 1.0], [float("nan"), 1.0]])
def test_a_loss_that_is_not_finite_raises_and_leaves_the_weights(
    slopes: list[float], dtype: torch.dtype
) -> None:
    model = _Weights([1.0, 2.0])
    updater = Updater(model, SFTStage(lr=0.1), 5, dtype)
    updater.step([_pull(model, [1.0, 1.0])], 1.0)
    before = {name: tensor.clone() for name, tensor in updater.state().items()}
    with pytest.raises(StageError, match=r"update 1: loss=.*lower lr.*Weights are unchanged"):
        updater.step([_pull(model, [1.0, 1.0]), _pull(model, slopes)], 1.0)
    _assert_same_tensors(updater.state(), before)
    assert updater.steps_done == 1
    assert updater.step([_pull(model, [1.0, 1.0])], 1.0).grad_norm == pytest.approx(2**0.5)


# --- denominators -------------------------------------------------------------------------------


def _model() -> torch.nn.Module:
    model = tiny_model("student", 0)
    model.set_attn_implementation("headwater")
    return model


def _groups() -> list[PackedGroup]:
    rng = random.Random(0)
    groups = []
    for row in range(7):
        prompt = tuple(rng.randrange(60) for _ in range(rng.randint(1, 6)))
        completion = tuple(rng.randrange(60) for _ in range(rng.randint(1, 15)))
        groups.append(PackedGroup(prompt, (completion,), (row,)))
    return groups


def _step(model: torch.nn.Module, updater: Updater, groups: list[PackedGroup], budget: int):
    def loss(micro: tuple[PackedGroup, ...]) -> Callable[[], LossSums]:
        def compute() -> LossSums:
            batch = pack(micro, dtype=torch.float32, device="cpu")
            ones = torch.ones(batch.target_ids_T.shape[0])
            hidden = hidden_at_targets(model, batch)
            return chunked_head_loss(
                hidden, head_weight(model), cross_entropy(batch.target_ids_T, ones)
            )

        return compute

    count = sum(len(completion) for group in groups for completion in group.completions)
    micros = list(micro_batches(groups, budget))
    return len(micros), updater.step([loss(micro) for micro in micros], float(count))


def test_micro_batches_change_nothing_beyond_rounding() -> None:
    found = []
    for budget in (10_000, 50, 1):
        model = _model()
        updater = Updater(model, SFTStage(lr=1e-3), 1)
        found.append((*_step(model, updater, _groups(), budget), updater.state()))
    assert found[0][0] == 1 < found[1][0] < found[2][0] == 7
    for _, result, state in found[1:]:
        assert result.loss == pytest.approx(found[0][1].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(found[0][1].grad_norm, rel=1e-5)
        assert result.metrics == pytest.approx(found[0][1].metrics, rel=1e-5)
        for name, tensor in state.items():
            if name.startswith("exp_avg/"):
                scale = float(found[0][2][name].abs().max())
                torch.testing.assert_close(
                    tensor, found[0][2][name], rtol=1e-4, atol=1e-5 * scale, msg=name
                )


# --- continuing ---------------------------------------------------------------------------------


def _assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 2])
def test_a_loaded_state_continues_bit_for_bit(
    done: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = SFTStage(lr=1e-2, schedule="cosine", warmup_steps=1, weight_decay=0.1)
    model = _model()
    straight = Updater(model, settings, 4, dtype)
    start = copy.deepcopy(model).float()

    def step(model: torch.nn.Module, updater: Updater, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        pulls = [torch.randn(p.shape, generator=rng) for p in model.parameters()]

        def loss() -> LossSums:
            pairs = zip(model.parameters(), pulls, strict=True)
            return LossSums(sum((p.float() * g).sum() for p, g in pairs), 1.0)

        updater.step([loss], 1.0)

    for seed in range(done):
        step(model, straight, seed)
    save_checkpoint(tmp_path, done, Checkpoint(straight.state(), {"updates": done}))
    for seed in range(done, 4):
        step(model, straight, seed)

    resumed = Updater(start, settings, 4, dtype)
    found = load_checkpoint(tmp_path)
    assert found is not None
    resumed.restore(found.read, found.state["updates"])
    for seed in range(done, 4):
        step(start, resumed, seed)
    _assert_same_tensors(resumed.state(), straight.state())
    _assert_same_tensors(dict(start.named_parameters()), dict(model.named_parameters()))


# --- checkpoints --------------------------------------------------------------------------------


def _save(folder: Path, step: int) -> None:
    tensors = {"weight": torch.full((64,), float(step))}
    save_checkpoint(folder, step, Checkpoint(tensors, {"done": step, "cursor": 10 * step}))


def test_a_checkpoint_comes_back_and_replaces_the_older_one(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    _save(tmp_path, 2)  # once more at the same step
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002.001"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"done": 2, "cursor": 20}
    weight = torch.zeros(64)
    found.read({"weight": weight})
    assert weight.tolist() == [2.0] * 64


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


def _other_number(path: Path) -> None:
    """A flipped bit that leaves valid JSON: "done": 2 becomes "done": 3."""
    text = path.read_text(encoding="utf-8")
    assert '"done": 2' in text
    path.write_text(text.replace('"done": 2', '"done": 3'), encoding="utf-8")


def _not_text(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tensors.safetensors", _truncate),
        ("tensors.safetensors", _flip),
        ("tensors.safetensors", Path.unlink),
        ("state.json", _truncate),
        ("state.json", _other_number),
        ("state.json", _not_text),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    file: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    _save(tmp_path / "older", 1)
    _save(tmp_path / "steps", 2)
    shutil.copytree(tmp_path / "older" / "step-000000001", tmp_path / "steps" / "step-000000001")
    damage(tmp_path / "steps" / "step-000000002" / file)
    found = load_checkpoint(tmp_path / "steps")
    assert found is not None and found.state["done"] == 1
    shutil.rmtree(tmp_path / "steps" / "step-000000001")
    assert load_checkpoint(tmp_path / "steps") is None


def test_a_checkpoint_cut_off_while_writing_is_no_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "writing-123")
    assert load_checkpoint(tmp_path) is None
    _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
