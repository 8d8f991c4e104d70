"""The distance of a student to its teacher, against plain float64 forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwater.config.recipe import Diagnostics
from headwater.evals.probe import TOP_TOKENS
from headwater.losses.divergences import distance
from headwater.models.loading import load_tokenizer
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.scoring import FrozenModel
from headwater.stages.rollouts import RolloutSource
from stage_jobs import Run, make_job, make_model, problems

POSITIONS = 3
MEASURES = (
    "forward_kl",
    "reverse_kl",
    "entropy",
    "teacher_entropy",
    "top_overlap",
    "overlap_mass",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=30)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=60)


def probe(folder: Path, student: Path, teacher: Path) -> tuple[Run, dict[str, Any]]:
    config = Diagnostics(prompts=6, rollouts_per_prompt=2, positions=POSITIONS)
    job = make_job("probe", config, folder, model_dir=student, teacher_dir=teacher)
    run = Run(job).start()
    found: dict[str, Any] = json.loads((job.output_dir / "probe.json").read_text())
    return run, found


def test_every_measure_equals_a_plain_loop(tmp_path: Path, student: Path, teacher: Path) -> None:
    run, found = probe(tmp_path, student, teacher)
    tokenizer = load_tokenizer(student)
    vocabulary = usable_vocabulary(tokenizer)
    frozen = FrozenModel.load(student, torch.device("cpu"), torch.float32, vocabulary)
    source = RolloutSource(run.job, frozen.model, tokenizer, None)
    groups = source.draw(problems().problems[:6], 2, 0)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (student, teacher)
    ]
    rows: list[tuple[int, list[float]]] = []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
            with torch.no_grad():
                ours, theirs = (
                    model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :vocabulary]
                    for model in models
                )
            for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                part = place * POSITIONS // len(rollout.response_ids)
                rows.append((part, plain_distance(one, other)))
    for place, measure in enumerate(MEASURES):
        values = [row[place] for _, row in rows]
        assert found[measure] == pytest.approx(sum(values) / len(values), abs=2e-5), measure
        for part in range(POSITIONS):
            own = [row[place] for where, row in rows if where == part]
            assert found["positions"][part][measure] == pytest.approx(
                sum(own) / len(own), abs=2e-5
            ), measure
    assert found["tokens"] == len(rows)
    assert found["reverse_kl"] > 0.01  # they do differ


def plain_distance(student: torch.Tensor, teacher: torch.Tensor) -> list[float]:
    p, q = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    log_p, log_q = student.log_softmax(-1).tolist(), teacher.log_softmax(-1).tolist()
    pairs = list(zip(p, q, log_p, log_q, strict=True))
    top_p = sorted(range(len(p)), key=lambda i: -p[i])[:TOP_TOKENS]
    top_q = sorted(range(len(q)), key=lambda i: -q[i])[:TOP_TOKENS]
    shared = set(top_p) & set(top_q)
    return [
        sum(b * (lb - la) for _, b, la, lb in pairs),
        sum(a * (la - lb) for a, _, la, lb in pairs),
        -sum(a * la for a, _, la, _ in pairs),
        -sum(b * lb for _, b, _, lb in pairs),
        len(shared) / TOP_TOKENS,
        sum(p[i] for i in shared),
    ]


def test_a_model_is_at_no_distance_from_itself(tmp_path: Path, student: Path) -> None:
    _, found = probe(tmp_path, student, student)
    assert found["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["top_overlap"] == 1.0
    assert found["entropy"] == pytest.approx(found["teacher_entropy"], abs=1e-6)


def test_a_probe_is_charged_to_evaluation_and_reads_no_label(
    tmp_path: Path, student: Path, teacher: Path
) -> None:
    run, found = probe(tmp_path, student, teacher)
    spent = run.spent()
    assert (spent["labels"], spent["verifier_calls"], spent["prompts"]) == (0, 0, 6)
    assert spent["generated_tokens"] == spent["teacher_scored_tokens"] == found["tokens"]
    with run.ledger() as ledger:
        assert ledger.spending().generated_tokens == 0  # nothing of it is training


def test_disjoint_certainties_share_no_top_mass() -> None:
    one, other = torch.full((1, 40), -9.0), torch.full((1, 40), -9.0)
    one[0, :4], other[0, -4:] = 9.0, 9.0
    found = distance(other, one, 4)
    assert float(found["top_overlap"]) == 0.0
    assert float(found["overlap_mass"]) == 0.0
    assert float(found["reverse_kl"]) == pytest.approx(18.0, abs=1e-3)
