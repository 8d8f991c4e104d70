"""The benchmarks train for real, do the peer's work, and count what that work needs."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from headwater.errors import InputError

FOLDER = Path(__file__).parents[1] / "benchmarks"

#: Keys of the peer's records that a comparison reads.
PEER_KEYS = {
    *("what", "transformers", "torch", "threads", "vocab", "batch", "micro_batch", "group"),
    *("prompt_len", "completion_len", "vary", "bf16", "grad_ckpt", "params_m", "student_m"),
    *("completion_tokens_last_step", "step_s", "mean_step_s", "mean_generate_s", "mean_train_s"),
    *("mean_loss_fwd_s", "rss_before_train_mib", "peak_rss_mib", "last_loss", "last_log"),
    *("teacher_m", "cont_batching", "param_dtype_after"),
}


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts as modules: they import each other as they do when run."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import compare
        import roofline
        import scaling
        import shapes
        import step
        import work

        yield SimpleNamespace(
            compare=compare,
            roofline=roofline,
            scaling=scaling,
            shapes=shapes,
            step=step,
            work=work,
        )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def _options(scripts: Any, workdir: Path, kind: str, **changes: Any) -> Any:
    sizes = {"batch": 6, "group": 3, "prompt_len": 5, "completion_len": 16, "steps": 2}
    sizes |= {"threads": 1, "dtype": "float32", "device": "cpu", "workdir": workdir}
    return scripts.work.Options(kind, **({"model": "tiny:student"} | sizes | changes))


@pytest.mark.parametrize("kind", ["grpo", "opd", "warmup"])
def test_a_step_trains_and_says_what_it_did(
    kind: str, scripts: Any, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = [] if kind == "grpo" else ["--teacher", "tiny:small"]
    sizes = "--batch 6 --group 3 --prompt-len 5 --completion-len 16 --steps 2 --threads 1"
    where = ["--dtype", "bfloat16", "--device", "cpu", "--roofline", "0", "--workdir", str(workdir)]
    arguments = [kind, "--model", "tiny:student", *teacher, *sizes.split(), *where]
    assert scripts.step.main(arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line.removeprefix("BENCH "))
    assert record.keys() >= PEER_KEYS
    assert record["completion_tokens_last_step"] == 6 * 16
    assert record["bf16"] == 1 and record["param_dtype_after"] == ["torch.bfloat16"]
    assert record["master_dtype"] == ["torch.float32"]
    assert len(record["step_s"]) == 2 and record["mean_step_s"] == record["step_s"][1]
    assert record["mean_train_s"] > record["mean_loss_fwd_s"] > 0
    parts = record["mean_generate_s"] + record["mean_train_s"]
    assert parts == pytest.approx(record["mean_step_s"], abs=2e-4)
    assert record["last_log"]["grad_norm"] > 0


def test_a_step_moves_the_weights_by_the_learning_rate(scripts: Any, workdir: Path) -> None:
    bench = scripts.work.Bench(_options(scripts, workdir, "grpo"))
    before = [p.detach().clone() for p in bench.updater.masters]
    bench.run_step(0)
    moved = [
        (p.detach() - q).abs().max().item()
        for p, q in zip(bench.updater.masters, before, strict=True)
    ]
    assert max(moved) == pytest.approx(1e-6, rel=0.2)  # AdamW's first step is lr * sign


@pytest.mark.parametrize("kind", ["opd", "warmup"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    kind: str, scripts: Any, workdir: Path
) -> None:
    folder = str(scripts.shapes.model_folder("tiny:student", workdir))
    options = _options(scripts, workdir, kind, model=folder, teacher=folder)
    result = scripts.work.Bench(options).run_step(0)
    assert result.metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert result.grad_norm == pytest.approx(0.0, abs=1e-3)


def test_prompts_and_ragged_lengths_are_those_of_the_peer(scripts: Any, workdir: Path) -> None:
    bench = scripts.work.Bench(_options(scripts, workdir, "grpo", vary=1))
    rng = random.Random(0)  # the peer's scripts draw in this order
    prompts = [tuple(rng.randrange(3, bench.vocab_size) for _ in range(5)) for _ in range(4)]
    for step in range(2):
        bench.run_step(step)
        lengths = [rng.randint(2, 16) for _ in range(6)]
        lengths[0] = 16
        rollouts = bench.batch.rollouts
        assert [len(r.response_ids) for r in rollouts] == lengths
        assert [len(r.sampler_logprobs) for r in rollouts] == lengths
        assert [r.prompt_ids for r in rollouts[::3]] == prompts[2 * step : 2 * step + 2]
        assert all(scripts.shapes.END_ID not in r.response_ids for r in rollouts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 7}, "batch=7 is not a multiple of group=3"),
        ({"group": 1}, "set --group >= 2"),
        ({"model": "tiny:nothing"}, "tiny:student"),
        ({"model": "smollm2-135m?width=3"}, "expected vocab=NUMBER or layers=NUMBER"),
    ],
)
def test_impossible_work_is_refused(
    changes: dict[str, Any], message: str, scripts: Any, workdir: Path
) -> None:
    with pytest.raises(InputError, match=message):
        scripts.work.Bench(_options(scripts, workdir, "grpo", **changes))


def test_a_distillation_without_a_teacher_is_refused(
    scripts: Any, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts.step.main(["opd", "--model", "tiny:student", "--workdir", str(workdir)]) == 2
    assert "give --teacher" in capsys.readouterr().err


# --- what the work needs --------------------------------------------------------------------


def test_counts_of_a_step_are_those_of_a_loop(scripts: Any) -> None:
    prompts, completions = [3, 5], [[4, 1], [2, 6]]
    shape = scripts.roofline.Shape(prompts, completions)
    body = pairs = decoded = 0
    for prompt, rows in zip(prompts, completions, strict=True):
        body += prompt
        pairs += sum(range(1, prompt + 1))
        decoded += prompt * (max(rows) - 1)  # one reading a step for the whole group
        for length in rows:
            for own in range(1, length):  # the last token is drawn but never fed
                body += 1
                pairs += prompt + own
                decoded += own
    assert (shape.targets, shape.body_tokens, shape.pairs) == (13, body, pairs)
    assert shape.cached_tokens_read == decoded


def test_arithmetic_of_a_forward_is_what_torch_counts(scripts: Any, workdir: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from headwater.models.loading import load_model

    folder = scripts.shapes.model_folder("tiny:student", workdir)
    model = load_model(folder, dtype=torch.float32, attn_implementation="eager")
    length = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_decoder()(torch.arange(length)[None], use_cache=False)
    config = scripts.shapes.config_of(folder)
    counted = scripts.roofline.Model(config, 4).forward(scripts.roofline.Shape([length], [[1]]))
    head = 2.0 * config["vocab_size"] * config["hidden_size"]
    # torch's eager attention multiplies the masked half as well; rotary angles and norms differ
    heads, dim, layers = (
        config[key] for key in ("num_attention_heads", "head_dim", "num_hidden_layers")
    )
    masked = 4.0 * layers * heads * dim * (length * (length - 1) / 2)
    assert counted.flops - head + masked == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_least_time_is_bound_by_the_slower_of_arithmetic_and_memory(scripts: Any) -> None:
    roofline = scripts.roofline
    machine = roofline.Machine(flops_per_second=100e9, bytes_per_second=10e9)
    assert machine.least_seconds(roofline.Work(200e9, 5e9)) == 2.0
    assert machine.least_seconds(roofline.Work(200e9, 40e9)) == 4.0
    found = roofline.shares(machine, roofline.Work(200e9, 5e9), seconds=8.0)
    assert (found["matrix_share"], found["least_share"]) == (0.25, 0.25)
    assert found["bandwidth_share"] == pytest.approx(0.0625)


# --- the comparison -------------------------------------------------------------------------


STAND_IN = """
import json, sys
batch, length = (int(sys.argv[sys.argv.index(key) + 1]) for key in ("--batch", "--completion-len"))
record = {"mean_step_s": 90.0, "mean_generate_s": 30.0, "mean_train_s": 60.0, "peak_rss_mib": 1e6}
record["bf16"] = int(sys.argv[sys.argv.index("--bf16") + 1])
print("BENCH " + json.dumps(record | {"completion_tokens_last_step": batch * length - LESS}))
"""


def _compare(scripts: Any, workdir: Path, peer: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    compare: ModuleType = scripts.compare
    small = compare.Workload(
        "grpo", "tiny:student", batch=4, group=2, prompt_len=4, completion_len=4, dtype="float32"
    )
    monkeypatch.setitem(compare.WORKLOADS, "tiny", small)
    where = ["--peer-dir", str(peer), "--peer-python", sys.executable, "--workdir", str(workdir)]
    numbers = ["--steps", "2", "--threads", "1", "--out", str(workdir / "rows.jsonl")]
    return int(compare.main(["tiny", *where, *numbers]))


def _stand_in(folder: Path, less: int) -> Path:
    """A script in the peer's place that prints a record without doing the work."""
    folder.mkdir()
    for name in ("trl_grpo.py", "trl_opd.py"):
        (folder / name).write_text(STAND_IN.replace("LESS", str(less)), encoding="utf-8")
    return folder


def test_a_comparison_runs_both_sides_and_keeps_their_records(
    scripts: Any,
    workdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peer = _stand_in(tmp_path / "peer", less=0)
    assert _compare(scripts, workdir, peer, monkeypatch) == 0
    rows = [json.loads(line) for line in (workdir / "rows.jsonl").read_text().splitlines()]
    assert [(row["workload"], row["side"]) for row in rows] == [
        ("tiny", "headwater"),
        ("tiny", "trl tuned"),
    ]
    ours = rows[0]["result"]
    assert ours["completion_tokens_last_step"] == 16
    printed = capsys.readouterr().out
    assert f"{90.0 / ours['mean_step_s']:.2f}" in printed
    assert f"{1e6 / ours['peak_rss_mib']:.2f}" in printed


def test_unequal_work_is_not_compared(scripts: Any) -> None:
    results = scripts.compare.Results()
    results.add("headwater", {"completion_tokens_last_step": 16})
    results.add("trl tuned", {"completion_tokens_last_step": 15})
    with pytest.raises(RuntimeError, match="cannot be compared"):
        scripts.compare.check_same_work(results)


def test_without_the_peer_the_way_to_it_is_told_and_ours_runs(scripts: Any, tmp_path: Path) -> None:
    compare = scripts.compare
    _, settings, _ = compare.parse(["grpo", "--workdir", str(tmp_path)])
    reason = compare.missing_peer(settings)
    assert "trl==1.16.0" in reason and "--peer-python" in reason
    alone = replace(settings, peer_python=None)
    assert [side for side, _ in compare.sides(compare.WORKLOADS["grpo"], alone)] == ["headwater"]


def test_a_folder_without_the_peers_scripts_is_named(scripts: Any, tmp_path: Path) -> None:
    where = ["--peer-python", sys.executable, "--peer-dir", str(tmp_path)]
    _, settings, _ = scripts.compare.parse(["grpo", *where])
    assert scripts.compare.missing_peer(settings).startswith(f"{tmp_path} has no trl_grpo.py")


def test_a_scaling_sweep_changes_one_size(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands = []

    def run(command: list[str], threads: int) -> dict[str, Any]:
        commands.append(command)
        return {"mean_generate_s": 1.0, "mean_train_s": 2.0, "peak_rss_mib": 3.0}

    monkeypatch.setattr(scripts.scaling, "run", run)
    out = tmp_path / "scaling.jsonl"
    arguments = ["prompt", "vocabulary", "--kind", "opd", "--out", str(out)]
    assert scripts.scaling.main(arguments) == 0
    options = [dict(zip(c[3::2], c[4::2], strict=True)) for c in commands]
    assert [o["--prompt-len"] for o in options[:5]] == ["32", "64", "128", "256", "512"]
    assert {o["--completion-len"] for o in options} == {"64"}
    assert options[5]["--model"] == options[5]["--teacher"] == "smollm2-135m?vocab=16384"
    assert "| vocabulary | 262144 | 1.00 | 2.00 | 3 |" in capsys.readouterr().out
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(commands) == 9
