"""What to watch of a stage: means over its last quarter, and alarms in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.report.dynamics import _ends, alarms, dynamics_of
from headwater.report.results import StageRow


def stage(run_dir: Path, name: str, seed: int, rows: list[dict[str, float]]) -> StageRow:
    folder = run_dir / "artifacts" / name
    folder.mkdir(parents=True)
    lines = (json.dumps({"step": step, **row}) for step, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return StageRow(
        fingerprint=name,
        kind="grpo",
        model="student",
        pool="labels",
        seed=seed,
        used_by=("cold",),
        seconds=1.0,
        spent={},
    )


def test_means_are_over_the_last_quarter_and_over_seeds(tmp_path: Path) -> None:
    rising = [{"pass_rate": step / 10} for step in range(8)]
    flat = [{"pass_rate": 0.5, "truncation_rate": 0.4} for _ in range(8)]
    stages = [stage(tmp_path, "a", 0, rising), stage(tmp_path, "b", 1, flat)]
    (row,) = dynamics_of(stages, tmp_path)
    assert row.pass_rate == pytest.approx((0.65 + 0.5) / 2)
    assert row.truncation_rate == pytest.approx(0.4)  # the other seed does not log it
    assert row.repetition is None
    assert row.artifacts == ("a", "b")
    (alarm,) = row.alarms
    assert alarm.startswith("40% of responses are cut at the limit: raise sampling.max_new_tokens")


def test_stages_without_metrics_have_no_row(tmp_path: Path) -> None:
    empty = stage(tmp_path, "a", 0, [])
    assert dynamics_of([empty], tmp_path) == ()


@pytest.mark.parametrize(
    ("quantity", "now", "start", "words"),
    [
        ("repetition", 0.5, 0.1, "50% of 4-grams repeat earlier ones, from 10%"),
        ("repetition", 0.5, 0.5, None),  # a task whose answers repeat themselves
        ("zero_variance_share", 0.9, 0.2, "90% of groups have no reward signal"),
        ("sampler_gap", 0.08, 0.08, "sampler and trainer differ by 0.080 nats a token"),
        ("entropy", 0.01, 0.5, "entropy fell from 0.500 to 0.010 nats"),
        ("entropy", 0.4, 0.5, None),
        ("response_tokens", 90.0, 30.0, "responses grew from 30 to 90 tokens"),
        ("truncation_rate", 0.1, 0.0, None),
    ],
)
def test_thresholds_speak_in_words(
    quantity: str, now: float, start: float, words: str | None
) -> None:
    said = alarms({quantity: (now, start)})
    assert (said == ()) if words is None else said[0].startswith(words)


def test_the_gap_shown_is_that_of_steps_with_a_forward_pass_of_their_own() -> None:
    log = {
        step: {"sampler_gap": 1e-5, "forward_recorded": 1.0}
        | ({"entropy": 0.5} if step > 2 else {})
        for step in range(12)
    }
    log[0] = {"sampler_gap": 0.02, "forward_recorded": 0.0}
    log[8] = {"sampler_gap": 0.04, "forward_recorded": 0.0}
    assert _ends("sampler_gap", [log]) == (0.04, 0.02)
    assert _ends("entropy", [log]) == (0.5, 0.5)
    assert _ends("kl", [log]) is None
