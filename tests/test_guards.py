"""Guards: what they say, when they are silent, and that a resumed stage says the same."""

from __future__ import annotations

import pytest

from headwater.config.guards import Guards
from headwater.errors import InputError
from headwater.stages.alerts import Alert, read_alerts, write_alerts
from headwater.stages.guards import Watcher

STEPS = 40


def _alerts(settings: Guards, rows: list[dict[str, float]]) -> list[Alert]:
    watcher = Watcher(settings, STEPS)
    return [alert for step, row in enumerate(rows) for alert in watcher.watch(step, row)]


def _from(quantity: str, *values: float) -> list[dict[str, float]]:
    return [{quantity: value} for value in values]


@pytest.mark.parametrize(
    ("guard", "quantity", "calm", "wrong", "words"),
    [
        ("entropy_share", "entropy", 0.5, 0.01, "entropy collapsed to 0.0100 nats a token"),
        ("length_ratio", "response_tokens", 30.0, 61.0, "responses grew to 61 tokens, from 30"),
        ("truncation_rate", "truncation_rate", 0.5, 0.51, "51% of responses are cut at the limit"),
        ("repetition_rise", "repetition", 0.1, 0.36, "36% of 4-grams repeat earlier ones"),
        ("sampler_gap_nats", "sampler_gap", 0.05, 0.06, "sampler and trainer differ by 0.060 nats"),
        ("kl_rise_nats", "kl", 1.0, 1.6, "KL to the teacher is 1.600 nats a token, from 1.000"),
        ("kl_rise_nats", "reference_kl", 0.0, 0.6, "KL to the reference is 0.600 nats a token"),
        ("grad_norm_ratio", "grad_norm", 2.0, 21.0, "the gradient's norm is 21, from 2 at"),
    ],
)
def test_each_guard_speaks_once_after_enough_steps_in_a_row(
    guard: str, quantity: str, calm: float, wrong: float, words: str
) -> None:
    rows = _from(quantity, *[calm] * 6, *[wrong] * 20)
    (alert,) = _alerts(Guards(), rows)
    assert (alert.guard, alert.quantity, alert.step) == (guard, quantity, 11)
    assert alert.value == wrong
    assert words in alert.seen
    assert alert.seen.startswith("step 11 of 40: ")
    assert f"guards.{guard}: {getattr(Guards(), guard):g}" in alert.seen
    assert ". Likely causes: " in alert.words and ". Try: " in alert.words
    assert _alerts(Guards(**{guard: None}), rows) == []
    assert _alerts(Guards(), _from(quantity, *[calm] * STEPS)) == []


def test_groups_without_signal_are_told_after_many_steps() -> None:
    (alert,) = _alerts(Guards(), _from("zero_variance_share", 0.5, *[1.0] * 15))
    assert alert.step == 11 and "100% of groups have rewards that are all equal" in alert.seen
    (alert,) = _alerts(Guards(no_signal_steps=3), _from("zero_variance_share", *[1.0] * 15))
    assert alert.step == 3


def test_one_step_within_the_threshold_starts_the_count_again() -> None:
    wrong = [0.9] * 4
    assert _alerts(Guards(), _from("truncation_rate", *wrong, 0.1, *wrong, 0.1, *wrong)) == []
    assert len(_alerts(Guards(), _from("truncation_rate", *wrong, 0.1, *wrong, 0.9))) == 1


def test_a_spike_within_the_first_steps_is_not_what_later_ones_are_measured_by() -> None:
    rows = _from("grad_norm", 1.0, 1.0, 500.0, 1.0, 1.0, *[11.0] * 5)
    (alert,) = _alerts(Guards(), rows)
    assert alert.threshold == 10.0


def test_steps_that_learned_nothing_do_not_count() -> None:
    rows = _from("grad_norm", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, *[1.0] * 12)
    assert _alerts(Guards(), rows) == []  # against a start of zero everything would be too much
    gaps = [{}, {"truncation_rate": 0.9}] * 5
    assert [alert.step for alert in _alerts(Guards(), gaps)] == [10]


def test_alerts_follow_from_the_metrics_alone() -> None:
    """A watcher that was given the first steps again goes on as if it had never been away."""
    rows = [
        {"entropy": 0.5 * 0.7**step, "kl": 0.1 * step, "truncation_rate": step / STEPS}
        for step in range(STEPS)
    ]
    straight = _alerts(Guards(), rows)
    assert len(straight) == 3
    for stop in range(STEPS):
        watcher = Watcher(Guards(), STEPS)
        for step in range(stop):
            watcher.watch(step, rows[step])
        later = [a for step in range(stop, STEPS) for a in watcher.watch(step, rows[step])]
        assert later == [alert for alert in straight if alert.step > stop]


def test_alerts_come_back_from_their_file(tmp_path) -> None:
    assert read_alerts(tmp_path) == ()
    alerts = _alerts(Guards(), _from("truncation_rate", *[0.9] * 5))
    write_alerts([], tmp_path)
    assert not (tmp_path / "alerts.json").exists()
    write_alerts(alerts, tmp_path)
    assert list(read_alerts(tmp_path)) == alerts
    (tmp_path / "alerts.json").write_text('[{"guard": 1}]')
    with pytest.raises(InputError, match=r"alerts\.json holds no alerts.*expected.*run again"):
        read_alerts(tmp_path)
