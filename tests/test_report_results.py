"""results.json: what is computed from the tables, and what is refused when read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from headwater.config.claims import Contrast
from headwater.errors import InputError
from headwater.evals import statistics
from headwater.report.analysis import build_results
from headwater.report.comparing import ArmEvaluation
from headwater.report.results import Results, read_results, write_results
from headwater.types import AttemptTable
from run_folder import ARMS, attempt_table, built_results, make_run, run_record


def majority_right(table: AttemptTable) -> float:
    """How often answer 0, the right one, is the most frequent; ties count by their number."""
    assert table.votes is not None
    scores = []
    for votes_A in table.votes.reshape(-1, table.votes.shape[2]).tolist():
        counts = [votes_A.count(answer) for answer in range(4)]
        tied = counts.count(max(counts))
        scores.append(1.0 / tied if counts[0] == max(counts) > 0 else 0.0)
    return sum(scores) / len(scores)


def test_evaluations_older_than_votes_have_no_majority() -> None:
    run = run_record((0,), ("arithmetic",))
    first, *others = run.evaluations
    older = replace(first, table=replace(first.table, votes=None))
    rows = build_results(replace(run, evaluations=(older, *others))).rows
    assert rows[0].maj_at_k is None and rows[1].maj_at_k is not None


def test_rows_equal_the_statistics_of_their_tables() -> None:
    run = run_record((0, 1), ("arithmetic",))
    results = built_results((0, 1), ("arithmetic",))
    for row, evaluation in zip(results.rows, run.evaluations, strict=True):
        table = evaluation.table
        found = statistics.avg_at_k(table.correct)
        assert row.avg_at_k == found.mean
        assert row.standard_error == found.standard_error
        assert row.interval == (found.low, found.high)
        assert row.per_seed == tuple(table.correct[s].mean() for s in range(2))
        assert row.unparseable_share == (table.verdicts == "unparseable").mean()
        assert row.pass_at_k == table.correct.any(axis=2).mean()
        assert row.maj_at_k == pytest.approx(majority_right(table))
        assert (row.problems, row.attempts) == (120, 8)


def test_differences_equal_the_paired_statistics_and_are_corrected_together() -> None:
    run = run_record((0, 1, 2), ("arithmetic", "hard"))
    results = build_results(run)
    tables = {(e.arm, e.eval_set): e.table for e in run.evaluations}
    assert len(results.differences) == 6
    for row in results.differences:
        first, second = tables[row.better, row.eval_set], tables[row.than, row.eval_set]
        found = statistics.paired_difference(first.correct, second.correct)
        assert row.difference == found.mean
        assert row.interval == (found.low, found.high)
        assert row.minimum_detectable == found.minimum_detectable(6)
    corrected = statistics.holm([row.p_value for row in results.differences])
    assert [row.p_value_corrected for row in results.differences] == corrected


def test_problems_are_matched_by_id_not_by_place() -> None:
    run = run_record((0,), ("arithmetic",))
    order = np.random.default_rng(0).permutation(120)

    def shuffled(table: AttemptTable) -> AttemptTable:
        return AttemptTable(
            tuple(table.problem_ids[i] for i in order),
            table.seeds,
            table.verdicts[:, order],
            table.response_tokens[:, order],
            table.truncated[:, order],
        )

    mixed = tuple(
        replace(e, table=shuffled(e.table)) if e.arm == "cold_grpo" else e for e in run.evaluations
    )
    assert (
        build_results(replace(run, evaluations=mixed)).differences[0]
        == (built_results((0,), ("arithmetic",)).differences[0])
    )


def test_contrasts_use_the_student_of_an_arm_that_has_both() -> None:
    run = run_record((0,), ("arithmetic",))
    teacher = replace(run.evaluations[1], arm="bridge")
    results = build_results(replace(run, evaluations=(*run.evaluations, teacher)))
    assert results.titles()["bridge"] == "RL'd-teacher bridge"
    assert results.differences == built_results((0,), ("arithmetic",)).differences


def test_unknown_arms_and_other_problems_are_refused() -> None:
    run = run_record((0,), ("arithmetic",))
    with pytest.raises(InputError, match=r"'brigde', which was not evaluated; .*cold_grpo"):
        build_results(replace(run, contrasts=(Contrast(better="brigde", than="cold_grpo"),)))
    other = attempt_table(0.5, 1, (0,))
    renamed = replace(other, problem_ids=tuple(f"q{i}" for i in range(120)))
    evaluations = tuple(
        replace(e, table=renamed) if e.arm == "bridge" else e for e in run.evaluations
    )
    with pytest.raises(InputError, match="different problems"):
        build_results(replace(run, evaluations=evaluations))


def test_one_problem_has_no_standard_error_and_still_valid_json(tmp_path: Path) -> None:
    table = AttemptTable(
        ("p0",),
        (0,),
        np.array([[["correct", "timeout"]]], dtype=object),
        np.array([[[3, 5]]], dtype=np.int32),
        np.array([[[False, True]]]),
    )
    run = replace(
        run_record((0,), ("arithmetic",)),
        contrasts=(),
        evaluations=(ArmEvaluation("a", "A", "student", "arithmetic", table),),
    )
    write_results(build_results(run), tmp_path)
    row = read_results(tmp_path).rows[0]
    assert row.standard_error is None
    assert (row.timeout_share, row.truncated_share, row.mean_response_tokens) == (0.5, 0.5, 4.0)


def test_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    assert read_results(tmp_path) == results
    assert not list(tmp_path.glob("*.part"))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["schema"] == 2
    assert [row["arm"] for row in content["rows"]] == list(ARMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, r"has schema 1; this headwater .* reads 2"),
        ({"rows": 3}, r"rows: Input should be a valid"),
        ({"surprise": 1}, r"surprise: Extra inputs"),
        ({"seeds": ["0"]}, r"seeds.0: Input should be a valid integer"),
    ],
)
def test_other_versions_and_damage_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    make_run(tmp_path, seeds=(0,))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)


def test_missing_and_torn_files_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="continue it with"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1, ')
    with pytest.raises(InputError, match="is not JSON"):
        read_results(tmp_path)


def test_a_fingerprint_cannot_leave_the_run_folder() -> None:
    results = built_results((0,), ("arithmetic",))
    content = results.model_dump(mode="json", by_alias=True)
    content["stages"][0]["fingerprint"] = "../elsewhere"
    with pytest.raises(ValidationError, match="fingerprint"):
        Results.model_validate_json(json.dumps(content))


def test_reports_and_statistics_never_import_torch() -> None:
    code = (
        "import sys, headwater.report.page, headwater.report.terminal, headwater.report.samples;"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
