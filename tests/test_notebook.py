"""The notebook runs from its first cell to its last, and holds the outputs of such a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first-steps.ipynb"


def read() -> Any:
    """The notebook as stored; skips where what reads notebooks is not installed."""
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def test_outputs_are_stored() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert all(cell.execution_count for cell in cells)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [folder for folder in (str(Path.home()), "/tmp/") if folder in text]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = str(Path(__file__).parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    notebook = read()
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "step 40 of 40: reward" in said
    assert "nats a token" in said and "0 by the student" in said
    kept = {path.name for path in (tmp_path / "runs" / "first-steps").iterdir()}
    assert {"artifacts", "ledger.sqlite", "run.json", "evaluation"} <= kept
