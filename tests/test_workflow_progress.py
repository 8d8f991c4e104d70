"""What a person reads while a run goes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headwater.config.loading import validate_recipe
from headwater.workflow.data_identity import DataIdentity, GraphData
from headwater.workflow.graph import Graph
from headwater.workflow.planner import build_graph
from headwater.workflow.progress import LineView, LiveView, ProgressView, clock, make_view


def graph_of(seeds: list[int]) -> Graph:
    recipe = validate_recipe(
        {
            "name": "study",
            "task": {"train": "task:arithmetic", "eval": {"one": "a.jsonl"}},
            "models": {"student": {"source": "tiny:student"}},
            "pools": {"labels": 40},
            "arms": {name: {"student": ["grpo"]} for name in ("a", "b", "c", "d")},
            "seeds": seeds,
        }
    )
    identity = DataIdentity("problems", "labels", 40)
    return build_graph(recipe, GraphData({"labels": identity}, {"one": identity}))


def grpo(graph: Graph) -> str:
    return next(f for f, node in graph.nodes.items() if node.kind == "grpo")


def console() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_finished_stage_is_one_line_with_its_last_numbers() -> None:
    graph, out = graph_of([0]), console()
    with LineView(graph, out) as view:
        view.found(1)
        view.started(grpo(graph))
        numbers = {"pass_rate": 0.314, "loss": 0.02, "tokens_per_second": 1234.5}
        view.progressed(grpo(graph), {"step": 40, "total": 40} | numbers)
        view.finished(grpo(graph), 75.2)
    assert text(out) == (
        "[2/3] grpo labels (a, b, c and 1 more): 1:15, pass rate 31%, tokens/s 1,234\n"
    )


def test_a_loss_is_told_where_nothing_better_is() -> None:
    graph, out = graph_of([0, 1]), console()
    view = LineView(graph, out)
    view.started(grpo(graph))
    view.progressed(grpo(graph), {"step": 1, "total": 2, "loss": 1.2345})
    view.finished(grpo(graph), 1.0)
    assert "(a, b, c and 1 more; seed 0): 0:01, loss 1.234" in text(out)


def test_the_divergence_from_the_reference_is_told_beside_the_pass_rate() -> None:
    graph, out = graph_of([0]), console()
    view = LineView(graph, out)
    view.started(grpo(graph))
    numbers = {"loss": 0.02, "reference_kl": 0.0123, "pass_rate": 0.5}
    view.progressed(grpo(graph), {"step": 1, "total": 2} | numbers)
    view.finished(grpo(graph), 1.0)
    assert text(out).endswith(": 0:01, pass rate 50%, KL to reference 0.012\n")


def test_a_long_stage_tells_its_step_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, out = graph_of([0]), console()
    view = LineView(graph, out)
    now = [100.0]
    monkeypatch.setattr("headwater.workflow.progress.time.monotonic", lambda: now[0])
    view.started(grpo(graph))
    view.progressed(grpo(graph), {"step": 10, "total": 50})  # resumed at 10
    now[0] += 20.0
    view.progressed(grpo(graph), {"step": 20, "total": 50, "pass_rate": 0.5})
    assert text(out) == (
        "  grpo labels (a, b, c and 1 more): step 20 of 50, pass rate 50%, 1:00 left\n"
    )


def test_why_a_stage_stopped_is_told_with_its_name() -> None:
    graph, out = graph_of([0]), console()
    view = LineView(graph, out)
    view.started(grpo(graph))
    view.stopped(grpo(graph), "killed by SIGKILL")
    view.say("stopping")
    assert text(out) == "  grpo labels (a, b, c and 1 more): killed by SIGKILL\nstopping\n"


def test_the_live_table_shows_running_stages_and_the_whole() -> None:
    graph = graph_of([0])
    out = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with LiveView(graph, out) as view:
        view.found(1)
        view.started(grpo(graph))
        view.progressed(grpo(graph), {"step": 3, "total": 50, "kl": 0.25})
    drawn = text(out)
    for part in ("grpo labels", "a, b, c and 1 more", "3/50", "KL 0.250", "1 of 3 stages"):
        assert part in drawn


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_live_table_cuts_neither_step_nor_time_left(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, now = graph_of([0, 1]), [100.0]
    monkeypatch.setattr("headwater.workflow.progress.time.monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view = LiveView(graph, out)
    view.started(grpo(graph))
    view.progressed(grpo(graph), {"step": 100, "total": 5000})
    now[0] += 60.0
    numbers = {"pass_rate": 0.3, "response_tokens": 512, "tokens_per_second": 12345.0}
    view.progressed(grpo(graph), {"step": 200, "total": 5000} | numbers)
    out.print(view._render())
    heading, row, whole = text(out).splitlines()
    assert heading.split() == ["stage", "arms", "step", "numbers", "left"]
    assert row.startswith("grpo labels  a, b") and "200/5000" in row and "pass rate" in row
    assert row.rstrip().endswith("48:00") and len(row) <= width
    assert "0 of 6 stages" in whole


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_of([0])
    view = make_view(graph, quiet=True)
    assert type(view) is ProgressView
    with view:
        view.started(grpo(graph))
        view.say("hello")
        view.finished(grpo(graph), 1.0)
    assert isinstance(make_view(graph), LineView)  # pytest's stderr is no terminal
    assert capsys.readouterr() == ("", "")


def test_clock_carries_into_minutes_and_hours() -> None:
    assert [clock(s) for s in (0, 59.6, 3599.6, 36000)] == ["0:00", "1:00", "1:00:00", "10:00:00"]


@pytest.mark.parametrize("view_of", [LineView, LiveView])
def test_an_alert_is_one_lasting_line(view_of: type[LineView | LiveView]) -> None:
    graph, out = graph_of([0]), console()
    with view_of(graph, out) as view:
        view.started(grpo(graph))
        view.warned(grpo(graph), "step 11 of 40: [bold]far[/bold] too long")
    assert (
        "  warning: grpo labels (a, b, c and 1 more): step 11 of 40: [bold]far[/bold] too long\n"
        in text(out)
    )
