"""Everything a report leaves in a run folder beside results.json: page, tables, figures."""

from __future__ import annotations

from pathlib import Path

from headwater.report.diagnostics import diagnostic_tables
from headwater.report.figures import write_figures
from headwater.report.map_view import map_table
from headwater.report.page import build_page
from headwater.report.paper_tables import paper_tables
from headwater.report.results import Results
from headwater.report.study_tables import study_tables
from headwater.report.tables import Table, write_tables
from headwater.report.views import arms_table


def write_report(results: Results, run_dir: Path) -> Path:
    """Write RUN/report.html, RUN/tables and RUN/figures; returns the page's path.

    results: those that RUN/results.json holds. Raises InputError when a metrics or rollouts file
    cannot be read.
    """
    page = build_page(run_dir)
    write_tables(all_tables(results), run_dir)
    write_figures(results, run_dir)
    return page


def all_tables(results: Results) -> tuple[Table, ...]:
    """Every table of the report that has rows."""
    mapped = map_table(results)
    return (
        *((arms_table(results),) if results.rows else ()),
        *study_tables(results),
        *paper_tables(results),
        *(() if mapped is None else (mapped,)),
        *diagnostic_tables(results),
    )
