"""The page of a synthetic run, its plots and its curves."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headwater.errors import InputError
from headwater.report.curves import Line, Panel, Quantity, learning_curves, read_metrics
from headwater.report.page import build_page
from headwater.report.plots import draw_panel, seed_mean, smooth, thinned
from headwater.report.quantities import duration
from headwater.report.results import read_results, write_results
from headwater.report.scale import scale_of
from run_folder import ARMS, HOSTILE, STAGES, fingerprint, make_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """Checks that elements nest, and collects ids, tags and visible text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, seeds=(0, 1), eval_sets=("arithmetic", "hard"))
    build_page(folder)
    return folder


@pytest.fixture(scope="module")
def outline(run_dir: Path) -> Outline:
    outline = Outline()
    outline.feed((run_dir / "report.html").read_text(encoding="utf-8"))
    outline.close()
    assert outline.open == []
    return outline


def test_page_holds_every_number_of_the_table(run_dir: Path, outline: Outline) -> None:
    text = " ".join(outline.text)
    for row in read_results(run_dir).rows:
        assert row.title in text
        assert f"{row.avg_at_k * 100:.1f}%" in text
        assert f"{row.interval[0] * 100:.1f} to {row.interval[1] * 100:.1f}" in text


def test_page_says_whose_spending_and_what_time_it_shows(run_dir: Path, outline: Outline) -> None:
    text = " ".join(" ".join(outline.text).split())
    assert "the amounts are those of one seed, averaged over seeds" in text
    assert "Stage time is the sum over these stages; stages that run side by side take less" in text
    results = read_results(run_dir)
    for_itself = sum(
        stage.spent["seconds"] * max(1, len(stage.used_by)) for stage in results.stages
    )
    assert f"each arm for itself, it would have been {duration(for_itself)}." in text


def test_page_fetches_nothing_and_runs_nothing(run_dir: Path, outline: Outline) -> None:
    assert outline.tags.isdisjoint({"script", "link", "iframe", "img", "object", "base"})
    assert all(reference.startswith("#") for reference in outline.references)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_element_ids_are_unique_and_every_reference_has_one(outline: Outline) -> None:
    assert len(outline.ids) == len(set(outline.ids))
    assert {reference[1:] for reference in outline.references} <= set(outline.ids)


def test_text_of_models_is_shown_and_never_obeyed(run_dir: Path, outline: Outline) -> None:
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert HOSTILE.replace("\x1b", "<U+001B>").replace("\u202e", "<U+202E>").replace(
        "\u202c", "<U+202C>"
    ) in "".join(outline.text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)


def test_names_from_recipes_are_escaped_everywhere(tmp_path: Path) -> None:
    results = make_run(tmp_path, seeds=(0,))
    bad = "<b onclick='x'>\u202e\"&"
    rows = tuple(row.model_copy(update={"title": bad, "chain": (bad,)}) for row in results.rows)
    write_results(
        results.model_copy(
            update={
                "rows": rows,
                "name": bad,
                "question": bad,
                "warnings": (bad,),
                "pools": {bad: 3},
                "contamination": ({bad: bad},),
            }
        ),
        tmp_path,
    )
    page = build_page(tmp_path).read_text(encoding="utf-8")
    assert "<b onclick" not in page
    assert "\u202e" not in page
    Outline().feed(page)


def test_page_of_a_run_without_metrics_rollouts_or_recipe(tmp_path: Path) -> None:
    results = make_run(tmp_path / "full", seeds=(0,))
    bare = results.model_copy(
        update={"rows": results.rows[:1], "differences": (), "stages": (), "warnings": ()}
    )
    bare_dir = tmp_path / "bare"
    bare_dir.mkdir()
    write_results(bare, bare_dir)
    page = build_page(bare_dir).read_text(encoding="utf-8")
    assert "Learning curves" not in page
    assert "Answers to read" not in page


def test_building_twice_gives_the_same_bytes(run_dir: Path) -> None:
    before = (run_dir / "report.html").read_bytes()
    assert build_page(run_dir).read_bytes() == before


def test_plots_take_their_colours_from_the_page() -> None:
    line = Line("a", 1, (((0, 1, 2), (0.1, 0.5, 0.4)),))
    svg = draw_panel(Panel("grpo", Quantity("pass_rate", "pass rate", "share"), (line,)), "x1")
    ElementTree.fromstring(svg)
    assert "var(--line-1)" in svg and "currentColor" in svg and "var(--rule)" in svg
    assert not re.search(r"#0102\d\d|#000000|DejaVu", svg)
    assert "%</text>" in svg


def test_seed_mean_uses_the_steps_all_seeds_have() -> None:
    line = Line("a", 0, (((0, 1, 2), (1.0, 2.0, 3.0)), ((1, 2, 3), (4.0, 5.0, 6.0))))
    steps, mean = seed_mean(line)
    assert steps.tolist() == [1, 2]
    assert mean.tolist() == [3.0, 4.0]


def test_smoothing_is_a_running_mean_that_keeps_lines_straight() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(80)
    np.testing.assert_allclose(smooth(values)[40], values[35:46].mean())
    np.testing.assert_allclose(smooth(np.arange(80.0)), np.arange(80.0), atol=1e-9)
    np.testing.assert_array_equal(smooth(values[:10]), values[:10])


def test_smoothing_never_leaves_the_range_of_the_values() -> None:
    share = np.concatenate([np.zeros(24), [0.01, 0.01, 0.01, 0.0, 0.0, 0.0]])
    assert smooth(share).min() >= 0.0 and smooth(share).max() <= 0.01
    assert smooth(1.0 - share).max() <= 1.0


def test_ticks_are_written_as_they_are() -> None:
    def labels(unit: str, values: tuple[float, ...]) -> list[str]:
        line = Line("a", 0, ((tuple(range(len(values))), values),))
        svg = draw_panel(Panel("opd", Quantity("x", "x", unit), (line,)), "x")
        return re.findall(r">([^<>]+)</text>", svg)

    shares = [text for text in labels("share", (0.975, 1.0, 0.983)) if text.endswith("%")]
    assert len(shares) == len(set(shares)) and {"98.4%", "99.2%"} <= set(shares)
    assert "6e-8" in labels("nats", (0.0, 9e-8))


def test_thinning_keeps_means_and_short_lines() -> None:
    steps, values = thinned(np.arange(500), np.arange(500.0) ** 2)
    assert steps.tolist()[:2] == [1.0, 4.0] and steps[-1] == 498.5
    assert values[0] == (0 + 1 + 4) / 3
    assert thinned([1, 2], [3.0, 4.0]).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_curves_group_seeds_and_end_with_preparation(run_dir: Path) -> None:
    curves = learning_curves(read_results(run_dir), run_dir)
    assert [kind.kind for kind in curves] == ["grpo", "warmup", "opd", "pretrain"]
    grpo = curves[0]
    assert [label for label, _ in grpo.legend][1] == "student on labels (Cold GRPO)"
    drawn = [panel.quantity.key for panel in grpo.leading]
    assert drawn == ["pass_rate", "response_tokens", "entropy"]  # reward is the pass rate here
    assert [len(line.runs) for line in grpo.leading[0].lines] == [2, 2, 2, 2]
    assert len(grpo.leading[0].lines[0].runs[0][0]) == STAGES["tg"][6]
    further = [panel.quantity.key for panel in grpo.further]
    assert further == ["reference_kl", "zero_variance_share", "repetition", "grad_norm"]


def test_distillation_shows_how_near_the_teacher_is(run_dir: Path) -> None:
    _, warmup, opd, _ = learning_curves(read_results(run_dir), run_dir)
    assert [panel.quantity.name for panel in warmup.leading] == ["forward KL", "entropy"]
    assert [panel.quantity.name for panel in opd.leading] == ["reverse KL", "entropy"]
    nearness = ["teacher_entropy", "top_overlap", "overlap_mass"]
    assert [panel.quantity.key for panel in warmup.further] == [*nearness, "loss", "grad_norm"]
    assert [panel.quantity.key for panel in opd.further] == [*nearness, "grad_norm"]


@pytest.mark.parametrize(
    ("kinds", "name"), [(("forward", "forward"), "forward KL"), (("mixed", "reverse"), "KL")]
)
def test_the_divergence_is_named_as_the_stages_settings_say(
    tmp_path: Path, kinds: tuple[str, str], name: str
) -> None:
    results = make_run(tmp_path, seeds=(0,))
    bridges = tuple(one for one in results.stages if one.fingerprint[:2] in ("ro", "to"))
    for stage, kind in zip(bridges, kinds, strict=True):
        manifest = tmp_path / "artifacts" / stage.fingerprint / "manifest.json"
        manifest.write_text(json.dumps({"config": {"kl": {"kind": kind}}}))
    (opd,) = learning_curves(results.model_copy(update={"stages": bridges}), tmp_path)
    assert opd.leading[0].quantity.name == name
    (tmp_path / "artifacts" / bridges[0].fingerprint / "manifest.json").unlink()
    (opd,) = learning_curves(results.model_copy(update={"stages": bridges[:1]}), tmp_path)
    assert opd.leading[0].quantity.name == "KL"


def test_a_loss_that_is_the_divergence_is_drawn_once(tmp_path: Path) -> None:
    results = make_run(tmp_path, seeds=(0,))
    path = tmp_path / "artifacts" / fingerprint("tw", 0) / "metrics.jsonl"
    path.write_text('{"step": 0, "kl": 2.0, "loss": 2.0}\n{"step": 1, "kl": 1.0, "loss": 1.0}\n')
    stages = tuple(one for one in results.stages if one.fingerprint == path.parent.name)
    (warmup,) = learning_curves(results.model_copy(update={"stages": stages}), tmp_path)
    assert [panel.quantity.key for panel in warmup.leading] == ["kl"] and warmup.further == ()


def test_metrics_keep_the_last_row_of_a_step_and_pass_over_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "kl": 1}\n{"step": 0, "kl": 2, "loss": NaN}\n{"step": 1, "k')
    assert read_metrics(path) == {0: {"step": 0.0, "kl": 2.0}}
    path.write_text('{"step": 0}\n{"kl": 2}\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: .* is not a metrics row"):
        read_metrics(path)


def test_damaged_attempts_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, seeds=(0,))
    attempts = tmp_path / "artifacts" / "eval-bridge" / "attempts.parquet"
    attempts.write_text("not parquet")
    with pytest.raises(InputError, match=r"attempts.parquet cannot be read .* run the stage"):
        build_page(tmp_path)
    pq.write_table(pa.table({"problem_id": ["p0"]}), attempts)
    with pytest.raises(InputError, match=r"attempts.parquet cannot be read .*attempt, prompt"):
        build_page(tmp_path)


def test_scale_holds_every_interval_with_round_ticks(run_dir: Path) -> None:
    rows = read_results(run_dir).rows
    for eval_set in ("arithmetic", "hard"):
        chosen = [row for row in rows if row.eval_set == eval_set]
        scale = scale_of(chosen)
        assert scale.low <= min(row.interval[0] for row in chosen)
        assert scale.high >= max(row.interval[1] for row in chosen)
        assert 2 <= len(scale.ticks) <= 8
    assert scale_of([]).ticks[0] == 0.0
    narrow = [rows[0].model_copy(update={"interval": (1.0, 1.0), "avg_at_k": 1.0, "per_seed": ()})]
    assert scale_of(narrow).high == 1.0 and scale_of(narrow).position(1.0) == 1.0


def test_every_row_shows_right_and_wrong_answers_of_its_evaluation(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    read = page[page.index("Answers to read") : page.index("Where the numbers come from")]
    for part in read.split("<details")[1:]:
        assert part.count("✓ correct") == 2 and part.count("✗ incorrect") == 2
    assert read.count("<details") == len(ARMS)


def test_stage_fingerprints_are_listed(run_dir: Path, outline: Outline) -> None:
    text = " ".join(outline.text)
    assert all(fingerprint(key, seed) in text for key in STAGES for seed in (0, 1))
    assert json.loads((run_dir / "results.json").read_text())["stages"]


def test_the_majority_is_shown_where_it_is_known(run_dir: Path, tmp_path: Path) -> None:
    results = read_results(run_dir)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    heading = '<th class="number">most frequent answer right</th>'
    assert page.count(heading) == len(results.eval_sets())
    make_run(tmp_path, seeds=(0,))
    rows = read_results(tmp_path).rows
    older = [row.model_copy(update={"maj_at_k": None}) for row in rows[1:]]
    mixed = read_results(tmp_path).model_copy(update={"rows": (rows[0], *older)})
    write_results(mixed, tmp_path)
    page = build_page(tmp_path).read_text(encoding="utf-8")
    assert page.count(heading) == 1
    assert page.count('data-name="most frequent answer right">–</td>') == len(older)
