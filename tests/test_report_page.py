"""The page of a synthetic run."""

from __future__ import annotations

from pathlib import Path

from run_folder import make_run

from headwater.report.page import build_page


def test_page_holds_every_arm_and_no_script(tmp_path: Path) -> None:
    results = make_run(tmp_path, seeds=(0,))
    page = build_page(tmp_path).read_text(encoding="utf-8")
    for row in results.rows:
        assert f"{row.avg_at_k * 100:.1f}%" in page
    assert "<script" not in page.lower()
