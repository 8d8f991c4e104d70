"""Tables made from routes, claims and diagnostics: their values, as CSV and as LaTeX."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from headwater.report.diagnostics import (
    alarms,
    claimed_arms,
    dynamics_table,
    gains_table,
    probes_table,
)
from headwater.report.families import Families
from headwater.report.files import all_tables
from headwater.report.map_view import grid_of, map_table, map_words
from headwater.report.paper_tables import paper_tables
from headwater.report.study_tables import (
    accounts_table,
    claims_table,
    ladder,
    one_run_table,
    sharing,
    sharing_words,
)
from headwater.report.tables import (
    Amounts,
    Column,
    Gap,
    Score,
    Table,
    TableRow,
    as_csv,
    as_latex,
    cell_text,
    write_tables,
)
from headwater.report.words import closing_words
from study_results import ARMS, difference, row, study


def texts(table: Table) -> list[list[str]]:
    return [
        [cell_text(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row.cells]
        for row in table.rows
    ]


def test_where_the_labels_go() -> None:
    table = paper_tables(study())[0]
    assert table.name == "where-labels-go"
    assert texts(table) == [
        ["direct GRPO", "student", "–", "60.0 (58.0 to 62.0)"],
        ["direct GRPO", "teacher", "–", "80.0 (78.0 to 82.0)"],
        ["bridge", "teacher", "raw", "35.0 (33.0 to 37.0)"],
        ["bridge", "teacher", "SFT'd", "50.0 (48.0 to 52.0)"],
        ["bridge", "teacher", "RL'd", "70.0 (68.0 to 72.0)"],
    ]
    assert table.rows[0].sources == ("ev-c",)


def test_transfers_halves_and_the_route_to_stage_three() -> None:
    _, transfers, halves, to_three = paper_tables(study())
    assert [line[1:] for line in texts(transfers)][2:] == [
        ["RL'd", "bridge", "70.0 (68.0 to 72.0)"],
        ["RL'd", "OPD only", "66.0 (64.0 to 68.0)"],
        ["RL'd", "teacher-sample SFT", "55.0 (53.0 to 57.0)"],
    ]
    assert [line[2:] for line in texts(halves)] == [
        ["bridge alone", "58.0 (56.0 to 60.0)"],
        ["then GRPO on the rest", "68.0 (66.0 to 70.0)"],
        ["then GRPO on the same half (replay)", "64.0 (62.0 to 66.0)"],
    ]
    assert [line[2:] for line in texts(to_three)] == [
        ["bridge", "68.0 (66.0 to 70.0)"],
        ["OPD only", "67.0 (65.0 to 69.0)"],
    ]


def test_tables_come_from_routes_and_not_from_names() -> None:
    names = {arm: f"x{place}" for place, arm in enumerate(reversed(ARMS))}
    renamed = study().model_copy(
        update={
            "rows": tuple(row(arm).model_copy(update={"arm": names[arm]}) for arm in ARMS),
            "routes": tuple(
                route.model_copy(update={"arm": names[route.arm]}) for route in study().routes
            ),
            "differences": (),
            "hypotheses": (),
        }
    )
    expected = [texts(table) for table in paper_tables(study())]
    assert [texts(table) for table in paper_tables(renamed)] == expected


def test_a_table_needs_two_rows_and_a_second_set_is_a_column() -> None:
    few = study(routes=tuple(route for route in study().routes if route.arm in ("c", "b2")))
    assert [table.name for table in paper_tables(few)] == ["where-labels-go"]
    both = study(rows=(*map(row, ARMS), row("c", eval_set="hard", avg_at_k=0.1)))
    table = paper_tables(both)[0]
    assert [column.name for column in table.columns[3:]] == ["sums avg@8", "hard avg@8"]
    assert [line[4] for line in texts(table)][:2] == ["10.0 (58.0 to 62.0)", "–"]


def test_every_family_is_told_by_route() -> None:
    families = Families(study())
    found = {one.title: families.family(one) for one in study().rows}
    assert families.siblings == {"m1"} and families.halves == ("1H", "2H")
    assert (found["Base student"], found["Cold GRPO"], found["Bridge"]) == (
        "base",
        "direct",
        "bridge",
    )
    assert (found["OPD only"], found["Replay"]) == ("transfer", "stage 3")
    assert found["Longer cold GRPO"] == "matched"
    assert found["Cold: small, 16 labels"] == found["Bridge: small, 16 labels"] == "map"
    assert found["Half bridge: its teacher"] == "teacher"


def test_claims_have_verdict_difference_p_and_detectable() -> None:
    assert texts(claims_table(study()))[2] == [
        "H2",
        "undecided",
        "Half split ≥ Bridge, less 1.0 points",
        "undecided",
        "−2.0 (−5.0 to +1.0)",
        "0.4",
        "5.0",
    ]


def test_accounts_stand_side_by_side() -> None:
    rows = tuple(
        one.model_copy(update={"spent_after_bases": {"labels": 256, "updates": 104}})
        if one.arm == "b2"
        else one
        for one in study().rows
    )
    first, second = accounts_table(study(rows=rows)).rows
    assert first.cells[0] == "labels and verifier calls"
    assert first.cells[2] == Amounts("labels", 256, 256, matched=True)
    assert first.cells[5] == Amounts("updates", 104, 24, matched=False)
    assert second.cells[5] == Amounts("updates", 104, 24, matched=True)
    assert [cell_text(cell) for cell in second.cells[6:]] == ["+5.0 (+2.0 to +8.0)", "0.4"]


def test_one_run_counts_what_single_seeds_would_have_claimed() -> None:
    rows = {one.arm: one for one in study().rows}
    lucky = rows["b2"].model_copy(update={"per_seed": (0.80, 0.55)})
    others = [one for arm, one in rows.items() if arm != "b2"]
    table = one_run_table(study(rows=(lucky, *others)))
    line = texts(table)[0]
    assert line[:4] == [
        "H1",
        "Bridge | Cold GRPO",
        "70.0 ± 1.0 | 60.0 ± 1.0",
        "+21.0  −6.0",
    ]
    assert line[4:] == ["1 | 1", "+10.0 (+7.0 to +13.0)", "< 0.001", "0.002"]
    one_seed = tuple(one.model_copy(update={"per_seed": (one.avg_at_k,)}) for one in others)
    assert one_run_table(study(rows=(*one_seed, rows["b2"]))).rows == ()


def test_the_ladder_goes_from_sparse_to_dense() -> None:
    assert [rung.row.arm for rung in ladder(study())] == ["c", "h2", "o2", "b2", "p1"]
    assert ladder(study(routes=study().routes[:3])) == ()


def test_sharing_counts_pairs_of_stage_and_arm() -> None:
    kinds = {one.kind: (one.trained, one.used, one.alone_seconds) for one in sharing(study())}
    assert kinds == {"grpo": (2, 4, 35.0), "opd": (1, 1, 2.0)}
    assert sharing_words(study()) == (
        "3 stages trained once stand for 5 uses: 17 s of stage time instead of 37 s had each arm "
        "trained alone."
    )
    assert sharing_words(study(stages=study().stages[1:3])) == ""


def test_gains_probes_and_dynamics() -> None:
    results = study()
    assert texts(gains_table(results)) == [
        ["teacher", "RL: grpo(labels)", "30.0", "80.0", "+50.0 (+45.0 to +55.0)"]
    ]
    probed = texts(probes_table(results, results.probes[:2]))
    assert probed[0][:4] == ["Bridge and 1 more", "at the start", "0.0800", "0.1600"]
    assert probed[1][1:] == ["after warmup", "0.0300", "0.0600", "75.0", "99.0", "0.100"]
    table = dynamics_table(results, results.dynamics)
    assert "repetition, %" not in [column.name for column in table.columns]  # nobody logs it
    assert texts(table)[0][2:5] == ["60.0", "20.0", "25.0"]
    assert texts(table)[0][-2] == "1e−7"
    assert alarms(results) == (
        ("student grpo on labels (Cold GRPO)", "25% of responses are cut at the limit"),
    )
    assert claimed_arms(results) == ("b2", "c", "b0", "p1", "o2")


def test_the_map_is_ordered_by_base_rate_and_told_in_words() -> None:
    results = study()
    assert results.map is not None
    grid = grid_of(results.map)
    assert grid.labels == (16, 64)
    assert [line.student for line in grid.lines] == ["small", "large"]
    assert grid.lines[1].cells[1] is None
    strengths = [grid.strength(cell) for line in grid.lines for cell in line.cells if cell]
    assert strengths == [0, 4, 2]
    assert map_words(results) == (
        "“Bridge” beats “Cold GRPO” in 1 of 3 cells (small at 64 labels); it loses in 1 of 3 "
        "cells (large at 16 labels); in 1 the two cannot be told apart."
    )
    table = map_table(results)
    assert table is not None and texts(table)[0][:3] == ["small", "20.0", "16"]


def test_words_speak_of_hypotheses_first() -> None:
    said = closing_words(study())
    assert said[0].text == (
        "Of 3 hypotheses, 1 is supported (H1), 1 is refuted (H3) and 1 stays undecided (H2)."
    )
    assert (said[1].kind, said[1].text) == ("against", "H3 is refuted: “OPD wins”.")
    assert said[2].text == (
        "Bridge took the student from 30.0% to 70.0% right on sums (avg@8) with 256 labels, the "
        "highest of 13 trained arms."
    )
    about_differences = [one for one in said if one.kind in ("found", "open")]
    assert len(about_differences) == 1 and "Longer cold GRPO" in about_differences[0].text
    alike = tuple(one for one in study().hypotheses if one.verdict == "supported") * 2
    assert closing_words(study(hypotheses=alike))[0].text == (
        "All 2 hypotheses are supported (H1 and H1)."
    )


HOSTILE = r"=cmd|'/c'!A1 & 50% $x_1$ {\input{a}} ~^# <b>" + "\x1b\u202e"


@pytest.fixture
def hostile() -> Table:
    return Table(
        name="bad",
        title=HOSTILE,
        columns=(Column(HOSTILE, number=False), Column("score")),
        rows=(
            TableRow((HOSTILE, Score(0.5, (0.4, 0.6))), ("ab12",)),
            TableRow(("[x", None)),
            TableRow(('a,"b"\nc', Gap(-0.1))),
        ),
    )


def test_csv_quotes_and_holds_full_numbers(hostile: Table) -> None:
    heads, first, second, third = csv.reader(io.StringIO(as_csv(hostile)))
    shown = HOSTILE.replace("\x1b", "<U+001B>").replace("\u202e", "<U+202E>")
    assert heads == [f"'{shown}", "score", "score low", "score high", "fingerprints"]
    assert first == [f"'{shown}", "0.5", "0.4", "0.6", "ab12"]
    assert second == ["[x", "", "", "", ""]
    assert third == ['a,"b"\nc', "-0.1", "", "", ""]


def test_latex_sets_text_as_it_is(hostile: Table) -> None:
    text = as_latex(hostile)
    escaped = (
        r"=cmd\textbar{}'/c'!A1 \& 50\% \$x\_1\$ \{\textbackslash{}input\{a\}\} "
        r"\textasciitilde{}\textasciicircum{}\# \textless{}b\textgreater{}"
        r"\textless{}U+001B\textgreater{}\textless{}U+202E\textgreater{}"
    )
    assert rf"{escaped} & 50.0 (40.0 to 60.0) \\" in text
    assert r"{}[x & -- \\" in text
    assert "a,''b'' c & $-$10.0 \\\\" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"\begin{tabular}{lr}" in text


def test_repeated_groups_are_left_blank_in_latex_only() -> None:
    table = paper_tables(study())[1]
    lines = [line for line in as_latex(table).splitlines() if line.endswith(r"\\")]
    assert lines[-1] == r" &  & teacher-sample SFT & 55.0 (53.0 to 57.0) \\"
    assert as_csv(table).splitlines()[-1].startswith("teacher,RL'd,teacher-sample SFT,0.55,")


def test_files_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    tables = all_tables(study())
    assert {table.name for table in tables} == {
        "arms",
        "hypotheses",
        "accounts",
        "one-run",
        "density-ladder",
        "where-labels-go",
        "transfer-protocol",
        "half-split",
        "route-to-stage-3",
        "map",
        "teacher-gains",
        "teacher-distance",
        "dynamics",
    }
    assert len(write_tables(tables, tmp_path)) == 26
    write_tables(tables[1:2], tmp_path)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "hypotheses.csv",
        "hypotheses.tex",
    ]


def test_differences_of_other_sets_leave_the_words_alone() -> None:
    more = difference("b2", "h2", 0.2, "supported", eval_set="hard")
    results = study(differences=(*study().differences, more))
    assert closing_words(results) == closing_words(study())


def test_a_p_value_keeps_its_space_in_latex() -> None:
    assert r" & \textless{}~0.001 & 0.002 \\" in as_latex(one_run_table(study()))
