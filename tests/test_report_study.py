"""The page and the terminal of a whole study: verdicts, map, families, alarms; nothing obeyed."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from headwater.config.claims import Contrast, Hypothesis
from headwater.report.analysis import build_results
from headwater.report.curves import LINES_AT_MOST, Line, learning_curves
from headwater.report.figures import write_figures
from headwater.report.page import Reading, build_page, render_page
from headwater.report.plots import seed_band
from headwater.report.results import MapResult, Results, write_results
from headwater.report.scale import difference_scale
from headwater.report.side_by_side import side_by_side
from headwater.report.terminal import print_summary
from headwater.report.views import arm_groups, probe_views
from run_folder import HOSTILE, fingerprint, make_run, run_record
from study_results import cell, difference, dynamics, row, stage, study
from test_report_page import Outline

BAD = "<b onclick='x'>\u202e\"&"


def page_of(results: Results) -> str:
    return render_page(results, Reading(curves=[], samples=[]))


def text_of(page: str) -> str:
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return " ".join(" ".join(outline.text).split()).replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_begins_with_verdicts_in_words() -> None:
    text = text_of(page_of(study()))
    assert text.index("Of 3 hypotheses, 1 is supported") < text.index("What was claimed")
    assert text.index("What was claimed") < text.index("What each arm reached")
    assert "✓ supported H1 It helps." in text
    assert "? undecided H2 Both." in text and "✗ refuted H3 OPD wins." in text
    claim = text[text.index("✓ supported H1") : text.index("? undecided H2")]
    assert "Bridge over Cold GRPO equal in labels, verifier calls" in claim
    assert claim.endswith("+10.0 +7.0 to +13.0 0.01 5.0 ")
    assert "Half split not behind Bridge by 1.0 points or more undecided" in text


def test_a_second_evaluation_set_is_folded_away() -> None:
    second = tuple(
        one.model_copy(update={"eval_set": "hard", "claims": (0,)})
        for one in study().hypotheses[:1]
    )
    results = study(
        hypotheses=(*study().hypotheses, *second), rows=(*study().rows, row("b2", eval_set="hard"))
    )
    assert "On hard: H1 supported" in text_of(page_of(results))


def test_every_section_of_a_study_is_there() -> None:
    text = text_of(page_of(study()))
    for heading in (
        "What one training run would have claimed",
        "Where the rule holds",
        "From sparse to dense",
        "Where the labels go",
        "The transfer protocol",
        "Half of the labels before the bridge, half after it",
        "The route to stage 3",
        "made equal on one account after another",
        "C1: is the teacher better than its base?",
        "C2: is the teacher near?",
        "How training went",
        "Trained once, used often",
    ):
        assert heading in text, heading
    bare = study(
        hypotheses=(), map=None, routes=(), gains=(), probes=(), dynamics=(), differences=()
    )
    for heading in ("What was claimed", "Where the rule", "From sparse", "paper’s tables", "C1:"):
        assert heading not in text_of(page_of(bare)), heading


def test_the_map_says_win_tie_and_lose_in_words() -> None:
    page = page_of(study())
    text = text_of(page)
    assert "small 20.0% = ties +1.0 −1.0 to +3.0 p 0.4 ▲ wins +12.0" in text
    assert "large 60.0% ▼ loses −6.0 −8.0 to −4.0 p 0.01 –" in text
    assert 'class="wins s4"' in page and 'class="loses s2"' in page and 'class="ties s0"' in page


def test_alarms_are_prominent() -> None:
    text = text_of(page_of(study()))
    assert text.index("⚠ 1 alarm while training") < text.index("What was claimed")
    assert (
        "1 alarm while training student grpo on labels (Cold GRPO) : 25% of responses are cut at "
        "the limit." in text
    )
    quiet = study(dynamics=(dynamics(alarms=()),))
    assert "⚠" not in page_of(quiet) and "No alarm: no stage passed" in text_of(page_of(quiet))


def test_rows_name_the_artifacts_they_come_from() -> None:
    page = page_of(study())
    assert 'title="from ev-b2; from ev-c"' in page  # a claim
    assert '<tr title="from ev-p2">' in page
    assert "Fingerprints by arm" in page


def test_many_arms_stand_in_families_and_few_in_one_list() -> None:
    groups = arm_groups(study(), study().rows)
    assert [(group.title, len(group.rows), group.folded) for group in groups] == [
        ("Untrained", 1, False),
        ("Trained on the labels directly", 2, False),
        ("Bridges", 4, False),
        ("Other transfers", 2, False),
        ("Transfer, then labels on the student", 3, False),
        ("Made equal on one account", 1, True),
        ("Teachers of these arms", 1, True),
        ("Cells of the map", 2, True),
    ]
    assert groups[2].reach == (0.35, 0.70)
    assert len(arm_groups(study(), study().rows[:7])) == 1
    assert "Bridges · 4 · 35.0% to 70.0%" in text_of(page_of(study()))


def test_arms_that_share_their_probes_are_shown_once() -> None:
    views = probe_views(study())
    assert views.first is not None and len(views.first.table.rows) == 3
    assert [round(height) for height, _ in views.first.bars[1]] == [38, 19]
    assert views.rest is None


def test_hostile_names_are_escaped_in_every_new_place() -> None:
    results = study()
    rows = tuple(one.model_copy(update={"title": BAD}) for one in results.rows)
    hypotheses = tuple(
        one.model_copy(update={"name": BAD, "statement": BAD}) for one in results.hypotheses
    )
    routes = tuple(one.model_copy(update={"teacher_base": BAD}) for one in results.routes)
    assert results.map is not None
    cells = (cell(BAD, 16, 0.2, 0.1, "wins"),)
    hostile = study(
        rows=rows,
        hypotheses=hypotheses,
        routes=routes,
        map=MapResult(rule=BAD, against=BAD, eval_set="sums", cells=cells),
        gains=tuple(one.model_copy(update={"model": BAD}) for one in results.gains),
        probes=tuple(one.model_copy(update={"after": BAD}) for one in results.probes),
        dynamics=(dynamics(kind=BAD, model=BAD, pool=BAD, used_by=(BAD,), alarms=(BAD,)),),
        stages=(stage("grpo", (), 3.0).model_copy(update={"kind": BAD, "used_by": (BAD, BAD)}),),
    )
    page = page_of(hostile)
    assert "<b onclick" not in page and "\u202e" not in page
    assert text_of(page).count("<b onclick='x'><U+202E>") > 60


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_run(folder, seeds=(0, 1))
    claims = (Contrast(better="bridge", than="cold_grpo"),)
    results = build_results(
        replace(
            run_record((0, 1), ("arithmetic",)),
            contrasts=claims,
            hypotheses={"H1": Hypothesis(statement="It helps.", claims=claims)},
        )
    )
    write_results(results, folder)
    return folder


def test_answers_stand_side_by_side_and_are_not_obeyed(run_dir: Path) -> None:
    page = build_page(run_dir).read_text(encoding="utf-8")
    assert "The same problems, arm by arm" in page
    assert HOSTILE[:8] not in page
    part = page[page.index("The same problems") : page.index("Answers to read")]
    assert part.count('class="problem"') == 3 and part.count("RL&#39;d-teacher bridge") == 3


def test_problems_on_which_arms_differ_come_first(run_dir: Path) -> None:
    results = build_results(run_record((0, 1), ("arithmetic",)))
    attempts = run_dir / "artifacts" / "eval-bridge" / "attempts.parquet"
    found = side_by_side(results, run_dir, ("bridge", "cold_grpo", "no such arm"), problems=2)
    assert [title for title, _ in found[0].attempts] == ["RL'd-teacher bridge", "Cold GRPO"]
    samples = {rollout.sample for _, rollout in found[0].attempts}
    assert len(samples) == 1 and attempts.is_file()
    assert side_by_side(results, run_dir, ("bridge",)) == ()
    assert found == side_by_side(results, run_dir, ("bridge", "cold_grpo"), problems=2)


def test_many_stages_of_one_kind_leave_room_for_the_claimed(run_dir: Path) -> None:
    base = build_results(run_record((0, 1), ("arithmetic",)))
    grpo = next(one for one in base.stages if one.fingerprint == fingerprint("sg", 0))
    stages = tuple(grpo.model_copy(update={"used_by": (f"other{i}",)}) for i in range(20))
    many = base.model_copy(update={"stages": (*stages, grpo)})
    (curves,) = learning_curves(many, run_dir)
    assert ("student on labels (Cold GRPO)", 3) in curves.legend and len(curves.legend) == 4
    assert [len(other.legend) for other in curves.others] == [LINES_AT_MOST, LINES_AT_MOST, 1]
    assert [panel.quantity.key for panel in curves.others[0].panels] == [
        "pass_rate",
        "response_tokens",
        "entropy",
    ]


def test_a_band_reaches_from_the_lowest_seed_to_the_highest() -> None:
    line = Line("a", 0, (((0, 1, 2), (1.0, 5.0, 3.0)), ((1, 2), (4.0, 6.0))))
    steps, low, high = seed_band(line)
    np.testing.assert_array_equal([steps, low, high], [[1, 2], [4.0, 3.0], [5.0, 6.0]])


def test_differences_have_an_axis_with_zero() -> None:
    scale = difference_scale([difference("b2", "c", 0.10, "supported")])
    assert scale.low == 0.0 and scale.high >= 0.13
    scale = difference_scale([difference("b2", "c", -0.42, "refuted")])
    assert scale.low <= -0.45 and scale.high == 0.0


def test_figures_are_written_as_svg_and_png(run_dir: Path) -> None:
    base = build_results(run_record((0, 1), ("arithmetic",)))
    paths = write_figures(study(stages=base.stages[:8], name="$x"), run_dir)
    names = sorted(path.name for path in paths)
    kinds = ("arms", "curves-grpo", "curves-pretrain", "density-ladder", "hypotheses", "map")
    assert names == sorted(f"{kind}.{end}" for kind in kinds for end in ("png", "svg"))
    assert (run_dir / "figures" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search("var\\(|#0102", (run_dir / "figures" / "curves-grpo.svg").read_text())


@pytest.mark.parametrize("width", [60, 100, 140])
def test_the_terminal_shows_hypotheses_first(width: int) -> None:
    out = io.StringIO()
    terminal = Console(file=out, width=width, color_system=None, force_terminal=False)
    results = study(rows=(*study().rows, *(row("h2", title=f"\x1b[2J{i}") for i in range(9))))
    print_summary(results, terminal)
    assert max(len(line) for line in out.getvalue().splitlines()) <= width
    flat = " ".join(out.getvalue().split())
    assert flat.index("✓ H1") < flat.index("Untrained") < flat.index("Of 3 hypotheses")
    assert "+7.0 to +13.0" in flat and "\x1b" not in flat
    assert "3 stages trained once stand for 5 uses" in flat
    assert "alarm: student grpo on labels" in flat


def test_many_warnings_are_folded() -> None:
    results = study(warnings=tuple(f"warning {number}" for number in range(20)))
    assert "14 more warnings warning 6" in text_of(page_of(results))
    out = io.StringIO()
    print_summary(results, Console(file=out, width=100, color_system=None, force_terminal=False))
    assert "warning: 14 more in the report" in out.getvalue()
    assert "warning 6" not in out.getvalue()
