"""An evaluation's attempts: what is written, and that one which was interrupted continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from headwater.config.evaluation import Evaluation, EvaluationSampling
from headwater.config.stages import Sampling
from headwater.evals.answers import votes_of
from headwater.verify.extract import extract_answer
from headwater.verify.vault import LabelVault
from headwater.verify.verifiers import make_verifier
from headwater.workflow.outcome import read_attempts
from stage_jobs import Run, make_job, make_model

BATCH = 4  # of ten problems: three batches


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=40)


@pytest.fixture
def make_run(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        config = Evaluation(**({"attempts": 3, "batch_prompts": BATCH} | changes))
        options = {"max_rows": 6}
        folder = tmp_path_factory.mktemp("evaluate")
        job = make_job("evaluate", config, folder, model_dir=student, options=options)
        return Run(job, labels=True)

    return make


def attempts(run: Run) -> bytes:
    """The whole file: it has the same bytes as another's or not."""
    return (run.job.output_dir / "attempts.parquet").read_bytes()


def test_answers_and_votes_are_those_of_the_responses(make_run: Callable[..., Run]) -> None:
    run = make_run().start()
    path = run.job.output_dir / "attempts.parquet"
    rows = pq.read_table(path).to_pylist()
    assert any(row["answer"] for row in rows) and not all(row["answer"] for row in rows)
    for start in range(0, len(rows), 3):
        of_problem = rows[start : start + 3]
        answers = [extract_answer(row["response"]) or None for row in of_problem]
        assert [row["answer"] for row in of_problem] == answers
        votes = votes_of(answers, make_verifier("exact").same_answers)
        assert [row["vote"] for row in of_problem] == votes
        assert all((row["answer"] is None) <= (row["verdict"] != "correct") for row in of_problem)


def test_votes_are_read_where_they_are(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run().start()
    path = run.job.output_dir / "attempts.parquet"
    table = read_attempts([path], (1,))
    assert table.votes is not None and table.votes.shape == (1, 10, 3)
    cast = [-1 if vote is None else vote for vote in pq.read_table(path)["vote"].to_pylist()]
    np.testing.assert_array_equal(table.votes.ravel(), cast)
    older = tmp_path / "older.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["vote", "answer"]), older)
    assert read_attempts([older], (1,)).votes is None
    assert read_attempts([path, older], (1, 2)).votes is None
    np.testing.assert_array_equal(read_attempts([older], (1,)).verdicts, table.verdicts)


@pytest.mark.parametrize("steps", [(1,), (2,), (1, 2), (3,)])
def test_an_interrupted_evaluation_ends_as_one_that_was_not(
    make_run: Callable[..., Run], steps: tuple[int, ...]
) -> None:
    straight, stopped = make_run().start(), make_run()
    for step in steps:
        stopped.interrupted_at(step)
    stopped.progress.clear()
    stopped.start()
    assert [values["step"] for values in stopped.progress] == list(range(steps[-1] + 1, 4))
    assert attempts(stopped) == attempts(straight)
    assert stopped.metrics() == straight.metrics()
    assert stopped.spent() == straight.spent() == stopped.spent(physical=True)


def test_a_killed_evaluation_redoes_one_batch(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = make_run().start(), make_run()
    grade, graded = LabelVault.grade, []

    def dying(self: LabelVault, account: Any, requests: Any) -> Any:
        verdicts = grade(self, account, requests)
        graded.append(len(verdicts))
        if len(graded) == 2:
            raise KeyboardInterrupt  # after the charge, before the batch is kept
        return verdicts

    with monkeypatch.context() as patch:
        patch.setattr(LabelVault, "grade", dying)
        with pytest.raises(KeyboardInterrupt):
            killed.start()
    killed.start()
    assert attempts(killed) == attempts(straight)
    assert killed.spent() == straight.spent()
    calls = killed.spent(physical=True)["verifier_calls"]
    assert calls == straight.spent()["verifier_calls"] + BATCH * 3


def test_damaged_batches_are_made_again(make_run: Callable[..., Run]) -> None:
    straight, run = make_run().start(), make_run()
    run.interrupted_at(3)
    _, second, _ = sorted(run.job.checkpoint_dir.iterdir())
    bits = bytearray(second.read_bytes())
    bits[len(bits) // 4] ^= 1
    second.write_bytes(bits)
    run.progress.clear()
    run.start()
    assert [values["step"] for values in run.progress] == [2, 3]
    assert attempts(run) == attempts(straight)


def test_changed_metrics_start_the_evaluation_over(make_run: Callable[..., Run]) -> None:
    straight = make_run().start()
    run = make_run().interrupted_at(2)
    metrics = run.job.output_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"pass_rate": ', '"pass_rate": 1'))
    run.start()
    assert run.metrics() == straight.metrics()
    assert (attempts(run), run.spent()) == (attempts(straight), straight.spent())


def test_batches_of_another_size_are_continued(make_run: Callable[..., Run]) -> None:
    run = make_run(batch_prompts=3).interrupted_at(2)
    job = make_job(
        "evaluate",
        Evaluation(attempts=3, batch_prompts=4),
        run.job.output_dir.parent,
        model_dir=run.job.model_dir,
        options=run.job.options,
    )
    rows = pq.read_table(Run(job, labels=True).start().job.output_dir / "attempts.parquet")
    expected = pq.read_table(make_run().start().job.output_dir / "attempts.parquet")
    assert rows["response"] == expected["response"]


def test_batches_of_other_attempts_are_not_taken(make_run: Callable[..., Run]) -> None:
    run = make_run(attempts=2).interrupted_at(2)
    job = make_job(
        "evaluate",
        Evaluation(attempts=3, batch_prompts=BATCH),
        run.job.output_dir.parent,
        model_dir=run.job.model_dir,
        options=run.job.options,
    )
    assert attempts(Run(job, labels=True).start()) == attempts(make_run().start())


def test_greedy_decoding_takes_the_likeliest_token(make_run: Callable[..., Run]) -> None:
    greedy = EvaluationSampling(temperature=0.0, max_new_tokens=10)
    cold = EvaluationSampling(temperature=1e-4, max_new_tokens=10)
    narrow = EvaluationSampling(temperature=1.0, top_k=1, max_new_tokens=10)
    runs = [make_run(attempts=1, sampling=one).start() for one in (greedy, cold, narrow)]
    responses = [pq.read_table(run.job.output_dir / "attempts.parquet")["response"] for run in runs]
    assert responses[0] == responses[1] == responses[2]


def test_contradictions_are_refused_where_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"16 attempts at temperature 0 .* set attempts to 1"):
        Evaluation(sampling=EvaluationSampling(temperature=0.0))
    with pytest.raises(ValueError, match="remove top_p and top_k"):
        EvaluationSampling(temperature=0.0, top_p=0.9)
    for bad in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EvaluationSampling(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=0.0)  # training needs ratios of probabilities
