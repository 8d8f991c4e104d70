"""A synthetic run folder with every part a report reads; numbers are drawn, not trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.config.claims import Contrast
from headwater.report.analysis import RunRecord, build_results
from headwater.report.comparing import ArmEvaluation
from headwater.report.results import LedgerTotals, Machine, Results, StageRow, write_results
from headwater.types import AttemptTable

PROBLEMS, ATTEMPTS = 120, 8
HOSTILE = (
    "<script>alert(1)</script> & \x1b[31mred\x1b[0m \u202eevil\u202c {{ 7 * 7 }} [bold]x[/bold]"
)

# arm: title, model evaluated, true rate, labels, stage keys
ARMS: dict[str, tuple[str, str, float, tuple[str, ...]]] = {
    "base_teacher": ("Base teacher", "teacher", 0.37, ("pt",)),
    "rl_teacher": ("RL'd teacher", "teacher", 0.78, ("pt", "tg")),
    "base_student": ("Base student", "student", 0.24, ("ps",)),
    "cold_grpo": ("Cold GRPO", "student", 0.47, ("ps", "sg")),
    "raw_bridge": ("Raw-teacher bridge", "student", 0.36, ("pt", "ps", "rr", "rw", "ro")),
    "bridge": ("RL'd-teacher bridge", "student", 0.60, ("pt", "ps", "tg", "tr", "tw", "to")),
    "half_split": (
        "Bridge, then GRPO on held-back labels",
        "student",
        0.615,
        ("pt", "ps", "hg", "hr", "hw", "ho", "hs"),
    ),
}
# key: kind, model, pool, seconds, verifier calls, generated tokens, updates
STAGES: dict[str, tuple[str, str, str | None, float, int, int, int]] = {
    "pt": ("pretrain", "teacher", None, 41.0, 0, 0, 400),
    "ps": ("pretrain", "student", None, 18.0, 0, 0, 400),
    "tg": ("grpo", "teacher", "labels", 96.0, 9_600, 412_000, 75),
    "sg": ("grpo", "student", "labels", 52.0, 9_600, 398_000, 75),
    "rr": ("teacher_rollouts", "teacher", "prompts", 12.0, 0, 61_000, 0),
    "rw": ("warmup", "student", "prompts", 14.0, 0, 0, 60),
    "ro": ("opd", "student", "prompts", 38.0, 0, 240_000, 60),
    "tr": ("teacher_rollouts", "teacher", "prompts", 12.0, 0, 58_000, 0),
    "tw": ("warmup", "student", "prompts", 14.0, 0, 0, 60),
    "to": ("opd", "student", "prompts", 38.0, 0, 236_000, 60),
    "hg": ("grpo", "teacher", "1H", 50.0, 4_800, 205_000, 40),
    "hr": ("teacher_rollouts", "teacher", "1H", 6.0, 0, 29_000, 0),
    "hw": ("warmup", "student", "1H", 7.0, 0, 0, 60),
    "ho": ("opd", "student", "1H", 20.0, 0, 118_000, 60),
    "hs": ("grpo", "student", "2H", 27.0, 4_800, 188_000, 40),
}
LABELS = {"labels": 240, "1H": 120, "2H": 120}


def fingerprint(key: str, seed: int) -> str:
    return f"{key}{seed}" + f"{abs(hash_of(key, seed)):014x}"


def hash_of(key: str, seed: int) -> int:
    return int.from_bytes(f"{key}{seed}".encode(), "big") * 2654435761 % 16**14


def make_run(
    run_dir: Path, *, seeds: tuple[int, ...] = (0, 1, 2), eval_sets: Iterable[str] = ("arithmetic",)
) -> Results:
    """Write a whole run folder and return its results."""
    for key in STAGES:
        for seed in seeds:
            write_stage(run_dir, key, seed)
    results = built_results(seeds, tuple(eval_sets))
    for arm in ARMS:
        write_evaluation(run_dir, arm)
    write_results(results, run_dir)
    (run_dir / "recipe.yaml").write_text(
        "name: arithmetic-quickstart\ntask: {train: 'task:arithmetic', verifier: exact}\n"
        "pools: {labels: 240, split: [1H, 2H], prompts: 2000}\nseeds: [0, 1, 2]\n",
        encoding="utf-8",
    )
    return results


@lru_cache
def built_results(seeds: tuple[int, ...], eval_sets: tuple[str, ...]) -> Results:
    return build_results(run_record(seeds, eval_sets))


def run_record(seeds: tuple[int, ...], eval_sets: tuple[str, ...]) -> RunRecord:
    return RunRecord(
        name="arithmetic-quickstart",
        seeds=seeds,
        machine=Machine(cpu="x86-64, 2 cores", threads=2, torch="2.9.0", transformers="5.10.0"),
        question="Does a label buy more when the teacher reads it?",
        evaluations=tuple(evaluation(arm, seeds, name) for name in eval_sets for arm in ARMS),
        contrasts=(
            Contrast(better="bridge", than="cold_grpo", differs_in=("teacher", "transfer")),
            Contrast(better="cold_grpo", than="raw_bridge", differs_in=("labels", "transfer")),
            Contrast(better="half_split", than="bridge", differs_in=("labels",)),
        ),
        stages=tuple(stage_row(key, seed) for key in STAGES for seed in seeds),
        ledger=LedgerTotals(
            physical=total([key for key in STAGES for _ in seeds], labels=240, more=1.04),
            training=total([key for key in STAGES for _ in seeds], labels=240),
            evaluation={"prompts": 840 * len(seeds), "generated_tokens": 310_000, "seconds": 44.0},
        ),
        pools={"labels": 240, "1H": 120, "2H": 120, "prompts": 2000, "validation": 60},
        contamination=({"eval_set": eval_sets[0], "removed": "2 exact", "near": "0"},),
        warnings=("student grpo on 2H: 31% of the groups gave no signal in the last ten steps",),
    )


def evaluation(arm: str, seeds: tuple[int, ...], eval_set: str) -> ArmEvaluation:
    title, model, rate, keys = ARMS[arm]
    kinds = [f"{STAGES[key][1]}: {STAGES[key][0]}({STAGES[key][2] or 'traces'})" for key in keys]
    chain = tuple(kind for kind in kinds if "pretrain" not in kind)
    trained = [key for key in keys if STAGES[key][0] != "pretrain"]
    spent = total(trained, labels=labels_of(trained))  # of one seed: all spend the same
    return ArmEvaluation(
        arm=arm,
        title=title,
        evaluates="teacher" if model == "teacher" else "student",
        eval_set=eval_set,
        table=attempt_table(rate if eval_set == "arithmetic" else rate / 3, len(title), seeds),
        chain=chain,
        spent=spent if chain else {},
        stages=tuple(fingerprint(key, seed) for key in keys for seed in seeds),
        evaluations=(f"eval-{arm}",),
    )


def labels_of(keys: Iterable[str]) -> int:
    pools = {STAGES[key][2] for key in keys if STAGES[key][0] == "grpo"}
    return sum(LABELS[pool] for pool in pools if pool)


def total(keys: list[str], *, labels: int, more: float = 1.0) -> dict[str, int | float]:
    rows = [STAGES[key] for key in keys]
    return {
        "labels": labels,
        "verifier_calls": round(sum(row[4] for row in rows) * more),
        "generated_tokens": round(sum(row[5] for row in rows) * more),
        "trained_tokens": round(sum(row[5] for row in rows) * more * 0.9),
        "updates": round(sum(row[6] for row in rows) * more),
        "flops": sum(row[3] for row in rows) * 2e10 * more,
        "seconds": sum(row[3] for row in rows) * more,
        "peak_memory_bytes": 612_000_000,
    }


def stage_row(key: str, seed: int) -> StageRow:
    kind, model, pool, seconds, _, _, _ = STAGES[key]
    return StageRow(
        fingerprint=fingerprint(key, seed),
        kind=kind,
        model=model,
        pool=pool,
        seed=seed,
        used_by=tuple(arm for arm, parts in ARMS.items() if key in parts[3]),
        seconds=seconds,
        spent=total([key], labels=labels_of([key])),
    )


def attempt_table(rate: float, salt: int, seeds: tuple[int, ...]) -> AttemptTable:
    difficulty_Q = np.random.default_rng(1).normal(0, 1.2, size=PROBLEMS)
    rng = np.random.default_rng(salt)
    centre_S = np.log(rate / (1 - rate)) + rng.normal(0, 0.06, size=len(seeds))
    rate_SQ = 1 / (1 + np.exp(-1.3 * (centre_S[:, None] - difficulty_Q)))
    shape = (len(seeds), PROBLEMS, ATTEMPTS)
    draw = rng.random(shape)
    verdicts = np.where(draw < rate_SQ[..., None], "correct", "incorrect").astype(object)
    verdicts[(draw > 0.97) & (verdicts == "incorrect")] = "unparseable"
    wrong = 1 + (draw * 1000).astype(np.int32) % 3  # one of three wrong answers
    votes = np.select([verdicts == "correct", verdicts == "unparseable"], [0, -1], wrong)
    return AttemptTable(
        problem_ids=tuple(f"p{index}" for index in range(PROBLEMS)),
        seeds=seeds,
        verdicts=verdicts,
        response_tokens=rng.integers(20, 60, size=shape).astype(np.int32),
        truncated=rng.random(shape) < 0.01,
        votes=votes.astype(np.int32),
    )


def write_stage(run_dir: Path, key: str, seed: int) -> None:
    kind, _, _, seconds, _, tokens, updates = STAGES[key]
    folder = run_dir / "artifacts" / fingerprint(key, seed)
    folder.mkdir(parents=True)
    config = {"kind": kind} | ({"kl": {"kind": "reverse"}} if kind == "opd" else {})
    manifest = {"kind": kind, "parents": [], "files": {}, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rng = np.random.default_rng(hash_of(key, seed))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as out:
        for step in range(updates):
            done = step / max(1, updates - 1)
            row = {"step": step, "seconds": seconds / updates}
            row["grad_norm"] = 0.5 + 0.4 * float(rng.random())
            if kind == "grpo":
                row["pass_rate"] = 0.25 + 0.4 * done**0.6 + float(rng.normal(0, 0.04))
                row["reward"] = row["pass_rate"]
                row["reference_kl"] = 0.03 * done + 0.002 * float(rng.random())
                row["response_tokens"] = 42 - 6 * done + float(rng.normal(0, 0.7))
                row["zero_variance_share"] = 0.2 + 0.2 * done
                row["repetition"] = 0.01 + 0.002 * float(rng.random())
            elif kind in ("warmup", "opd"):
                row["kl"] = 0.5 * float(np.exp(-3 * done)) + 0.05 + 0.01 * float(rng.random())
                row["teacher_entropy"] = 0.45 + 0.02 * float(rng.random())
                row["top_overlap"] = 0.5 + 0.2 * done
                row["overlap_mass"] = 0.9 + 0.09 * done
            if kind != "opd":
                row["loss"] = 3.0 * float(np.exp(-4 * done)) + 0.6 + 0.02 * float(rng.random())
            row["entropy"] = 0.8 - 0.3 * done + 0.02 * float(rng.random())
            out.write(json.dumps(row) + "\n")
    if tokens:
        graded = kind == "grpo"
        write_rollouts(folder / "rollouts.parquet", folder.name, graded, steps=(0, max(updates, 1)))


def write_evaluation(run_dir: Path, arm: str) -> None:
    folder = run_dir / "artifacts" / f"eval-{arm}"
    folder.mkdir(parents=True)
    rows = [
        {
            "problem_id": f"p{problem}",
            "attempt": attempt,
            "verdict": "correct" if right else "incorrect",
            "response_tokens": 38 + attempt,
            "truncated": attempt == 0,
            "prompt": prompt,
            "response": response,
            "level": 3,
            "subject": None,
        }
        for problem, attempt, right, prompt, response in answers()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "attempts.parquet")


def write_rollouts(path: Path, stage: str, graded: bool, steps: tuple[int, ...]) -> None:
    rows = [
        {
            "stage": stage,
            "step": step,
            "problem_id": f"p{problem}",
            "sample": sample,
            "prompt": prompt,
            "response": response,
            "verdict": ("correct" if right else "incorrect") if graded else None,
            "reward": float(right) if graded else None,
            "response_tokens": 38 + sample,
            "finish_reason": "stop" if sample else "length",
        }
        for step in steps
        for problem, sample, right, prompt, response in answers()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def answers() -> Iterator[tuple[int, int, bool, str, str]]:
    """(problem, sample, whether it is right, prompt, response); problem 5's are hostile."""
    for problem in range(6):
        for sample in range(4):
            right = (problem + sample) % 2 == 0
            answer = 12 + problem * 5 if right else 11 + problem * 5
            response = (
                f"{12 + problem * 5} is what 3 * 4 + {problem * 5} makes: first 3 * 4 = 12, "
                f"then 12 + {problem * 5} = {answer}.\nSo the answer is \\boxed{{{answer}}}"
            )
            prompt = f"What is 3 * 4 + {problem * 5}? Put the answer in \\boxed{{}}."
            yield problem, sample, right, prompt, HOSTILE if problem == 5 else response
