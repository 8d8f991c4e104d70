"""Case files: what is accepted, what is refused, and agreement on the shared conformance cases."""

import gzip
import json
import os
from pathlib import Path

import pytest

from headwater.errors import InputError
from headwater.verify.cases import CaseResult, read_cases, run_cases

SHARED = Path(os.environ.get("HEADWATER_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def _file(folder: Path, *rows: object) -> Path:
    path = folder / "cases.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def _disagreeing(results: list[CaseResult]) -> list[str]:
    """Ids of the rows that expect another verdict."""
    return [
        row["id"]
        for row in results
        if "expected" in row and (row["verdict"] == "correct") != row["expected"]
    ]


def test_rows_get_verdicts_in_order(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"id": "a", "prediction": r"\boxed{1/2}", "gold": "0.5", "expected": True},
        "",
        {"prediction": "0.5", "gold": "0.5", "expected": True},
        {"id": 7, "prediction": r"\boxed{2}", "gold": "3"},
    )
    results = run_cases(path, "math")
    assert [(row["id"], row["verdict"]) for row in results] == [
        ("a", "correct"), ("3", "unparseable"), ("7", "incorrect"),
    ]  # fmt: skip
    assert all(row["seconds"] < 1 for row in results)
    assert _disagreeing(results) == ["3"]
    assert "expected" not in results[2]


def test_bare_predictions_can_be_boxed(tmp_path: Path) -> None:
    rows = [{"prediction": text, "gold": "2"} for text in ("2", r"\boxed{3} or 2")]
    verdicts = [row["verdict"] for row in run_cases(_file(tmp_path, *rows), wrap_bare=True)]
    assert verdicts == ["correct", "incorrect"]


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prediction": "4", "gold": "4"}\n'))
    assert [case.prediction for case in read_cases(path)] == ["4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "cases.jsonl:2: not JSON"),
        ("[1]", "cases.jsonl:2: a row is list, expected an object"),
        ({"gold": "secret"}, "cases.jsonl:2: no 'prediction'"),
        ({"prediction": "1", "gold": 1}, "cases.jsonl:2: 'gold' is not text"),
        ({"prediction": "1", "gold": "secret", "expected": 1}, "cases.jsonl:2: 'expected' is 1"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = _file(tmp_path, {"prediction": "1", "gold": "1"}, row)
    with pytest.raises(InputError) as caught:
        read_cases(path)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_cases(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no rows"):
        read_cases(_file(tmp_path))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"not JSON .*utf-8"):
        read_cases(tmp_path / "binary.jsonl")
    whole = gzip.compress(b'{"prediction": "4", "gold": "4"}\n' * 50)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"torn\.jsonl\.gz: unreadable after line"):
        read_cases(tmp_path / "torn.jsonl.gz")


def test_a_number_too_long_for_python_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"prediction": "4", "gold": {"7" * 5_000}}}\n')
    with pytest.raises(InputError, match=r"long\.jsonl:1: not JSON \(Exceeds the limit"):
        read_cases(path)


def test_gold_is_in_no_repr(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prediction": "1", "gold": "secret"})
    assert "secret" not in repr(read_cases(path))
    assert "secret" not in repr(run_cases(path))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the shared data folder ({SHARED})")
@pytest.mark.parametrize("name", ["verifier_cases.jsonl", "hostile_outputs_sample.jsonl"])
def test_agreement_with_the_shared_cases(tmp_path: Path, name: str) -> None:
    rows = [json.loads(line) for line in (SHARED / name).read_text().splitlines()]
    for row in rows:
        if row["id"].startswith("vc-ans"):
            row["prediction"] = f"\\boxed{{{row['prediction']}}}"
    results = run_cases(_file(tmp_path, *rows))
    assert _disagreeing(results) == []
    assert max(row["seconds"] for row in results) < 2
