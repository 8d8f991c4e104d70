"""What the terminal shows: the summary and the rollouts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from headwater.errors import InputError
from headwater.report.quantities import percent
from headwater.report.results import read_results
from headwater.report.samples import (
    collect_samples,
    draw_lots,
    print_samples,
    read_rollouts,
    rollouts_of_arm,
)
from headwater.report.scale import Scale
from headwater.report.terminal import print_summary, whisker
from headwater.report.words import closing_words
from run_folder import ARMS, fingerprint, make_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, seeds=(0, 1))
    return folder


def console(width: int) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, color_system=None, force_terminal=False), out


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_summary_has_every_arm_score_and_sentence(run_dir: Path, width: int) -> None:
    results = read_results(run_dir)
    terminal, out = console(width)
    print_summary(results, terminal)
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    flat = " ".join(out.getvalue().split())
    for row in results.rows:
        assert f"{percent(row.avg_at_k)[:-1]} ±" in flat
    for sentence in closing_words(results):
        assert " ".join(sentence.text.split()) in flat


@pytest.mark.parametrize("width", [80, 95, 96, 110, 125, 126, 160])
def test_no_column_is_cut(run_dir: Path, width: int) -> None:
    terminal, out = console(width)
    print_summary(read_results(run_dir), terminal)
    heading = next(line for line in out.getvalue().splitlines() if "avg@" in line)
    assert heading.split()[-6:] == ["labels", "calls", "tokens", "updates", "stage", "time"]
    assert "…" not in heading


def test_summary_says_whose_spending_and_what_time_it_shows(run_dir: Path) -> None:
    results = read_results(run_dir)
    terminal, out = console(140)
    print_summary(results, terminal)
    flat = " ".join(out.getvalue().split())
    assert "stage time" in flat
    assert "charged for one seed (the mean over seeds) with every stage" in flat
    assert "time is the sum over these stages" in flat
    terminal, out = console(140)
    print_summary(results.model_copy(update={"seeds": (0,)}), terminal)
    assert "charged with every stage" in " ".join(out.getvalue().split())


def test_scores_are_rounded_as_in_the_sentences(run_dir: Path) -> None:
    results = read_results(run_dir)
    rows = tuple(row.model_copy(update={"avg_at_k": 0.9425}) for row in results.rows)
    terminal, out = console(140)
    print_summary(results.model_copy(update={"rows": rows}), terminal)
    assert "94.3 ±" in out.getvalue() and "94.2 ±" not in out.getvalue()
    assert "94.3%" in out.getvalue()


def test_summary_does_not_obey_markup_or_escapes(run_dir: Path) -> None:
    results = read_results(run_dir)
    rows = tuple(row.model_copy(update={"title": "[red]\x1b[2Jx"}) for row in results.rows)
    terminal, out = console(140)
    print_summary(results.model_copy(update={"rows": rows, "warnings": ("[b]\x07",)}), terminal)
    assert "[red]<U+001B>[2Jx" in out.getvalue()
    assert "[b]<U+0007>" in out.getvalue()
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()


def test_whisker_places_mean_and_interval(run_dir: Path) -> None:
    row = (
        read_results(run_dir)
        .rows[2]
        .model_copy(update={"avg_at_k": 0.5, "interval": (0.3, 0.7), "evaluates": "student"})
    )
    scale = Scale(0.0, 1.0, ())
    assert whisker(row, scale, 11) == "   ├─●─┤   "
    assert whisker(row.model_copy(update={"interval": (0.5, 0.5)}), scale, 11) == " " * 5 + "●     "
    assert whisker(row.model_copy(update={"evaluates": "teacher"}), scale, 11)[5] == "◆"


def test_samples_show_right_and_wrong_answers_of_one_arm(run_dir: Path) -> None:
    ((heading, rollouts),) = collect_samples(run_dir, arm="bridge", number=4)
    assert heading == "RL'd-teacher bridge (student)"
    assert [rollout.verdict for rollout in rollouts] == ["correct"] * 2 + ["incorrect"] * 2
    assert {rollout.stage for rollout in rollouts} == {"eval-bridge"}
    assert {rollout.step for rollout in rollouts} == {None}


def test_an_attempt_reads_as_a_rollout(run_dir: Path) -> None:
    first, second = read_rollouts(run_dir, "eval-base_student")[:2]
    assert (first.problem_id, first.sample, first.verdict) == ("p0", 0, "correct")
    assert (second.sample, second.verdict, second.response_tokens) == (1, "incorrect", 39)
    assert (first.finish_reason, second.finish_reason) == ("length", "stop")
    assert (first.step, first.reward) == (None, None)
    assert first.response.endswith("\\boxed{12}")


def test_samples_by_kind_and_fingerprint(run_dir: Path) -> None:
    by_kind = collect_samples(run_dir, stage="grpo")
    assert len(by_kind) == 8  # four stages, two seeds
    ((heading, rollouts),) = collect_samples(run_dir, stage=fingerprint("sg", 1)[:6])
    assert heading == "student grpo on labels, seed 1: Cold GRPO"
    assert {rollout.step for rollout in rollouts} == {75}
    ungraded = collect_samples(run_dir, arm="bridge", stage="opd")
    assert {one.verdict for _, rollouts in ungraded for one in rollouts} == {None}


def test_samples_refuse_what_is_not_there(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"arm 'brigde' is not in this run; did you mean 'bridge'"):
        collect_samples(run_dir, arm="brigde")
    with pytest.raises(InputError, match="no rollouts in"):
        collect_samples(run_dir, stage="nothing")
    with pytest.raises(InputError, match="is not a folder"):
        collect_samples(tmp_path / "missing")


def test_samples_of_an_unfinished_run_are_read_by_artifact(tmp_path: Path) -> None:
    make_run(tmp_path, seeds=(0,))
    (tmp_path / "results.json").unlink()
    headings = [heading for heading, _ in collect_samples(tmp_path)]
    assert fingerprint("tg", 0) in headings and len(headings) == 10 + len(ARMS)
    with pytest.raises(InputError, match="leave out the arm"):
        collect_samples(tmp_path, arm="bridge")


def test_printed_samples_are_neutralised(run_dir: Path) -> None:
    terminal, out = console(100)
    print_samples(run_dir, terminal, arm="bridge", number=1)
    assert "✓ correct  problem p" in out.getvalue() and "step" not in out.getvalue()
    print_samples(run_dir, terminal, stage="grpo", number=24)
    assert "<U+001B>[31mred" in out.getvalue() and "[bold]x[/bold]" in out.getvalue()
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()


def test_an_arm_never_shows_its_other_models_rollouts(run_dir: Path) -> None:
    results = read_results(run_dir)
    row = next(row for row in results.rows if row.arm == "bridge")
    shown = rollouts_of_arm(run_dir, results, row.model_copy(update={"evaluations": ()}))
    assert {rollout.stage[:2] for rollout in shown} == {"to"}
    names = {"teacher": "large", "student": "small"}
    stages = tuple(one.model_copy(update={"model": names[one.model]}) for one in results.stages)
    renamed = results.model_copy(update={"stages": stages})
    assert rollouts_of_arm(run_dir, renamed, row.model_copy(update={"evaluations": ()})) == shown


def test_lots_prefer_different_problems_and_never_repeat(run_dir: Path) -> None:
    rollouts = read_rollouts(run_dir, "eval-bridge")
    drawn = draw_lots(rollouts, ("correct",), 6)
    assert len({rollout.problem_id for rollout in drawn}) == 6
    everything = draw_lots(rollouts, ("correct",), 100)
    assert len(everything) == len(set(map(id, everything))) == 12
    assert draw_lots(reversed(rollouts), ("correct",), 6) == drawn
