"""The names under which trackers get our metrics: those of TRL where the meaning is the same."""

from __future__ import annotations

from collections.abc import Mapping

#: Key of metrics.jsonl -> the name TRL logs the same quantity under.
PEER_NAMES: Mapping[str, str] = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "reference_kl": "kl",
    "entropy": "entropy",
    "response_tokens": "completions/mean_length",
    "truncation_rate": "completions/clipped_ratio",
    "zero_variance_share": "frac_reward_zero_std",
    "clipped_share": "clip_ratio/region_mean",
    "sampler_gap": "sampling/sampling_logp_difference/mean",
    "importance_weight": "sampling/importance_sampling_ratio/mean",
}
#: Begins the name of everything else.
OWN = "headwater/"


class NamedRows:
    """Rows of one stage's metrics.jsonl under the trackers' names; give each once, in order.

    Adds what follows from the rows so far: `step_time` (seconds since the row before, or since
    the stage began) and `num_tokens` (tokens trained on so far).
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def named(self, row: Mapping[str, float]) -> tuple[int, dict[str, float]]:
        """(step from 1, values by name) of a row."""
        values = {PEER_NAMES.get(key, f"{OWN}{key}"): value for key, value in row.items()}
        del values[f"{OWN}step"]
        seconds = values.pop(f"{OWN}seconds", None)
        if seconds is not None:
            values["step_time"] = max(0.0, seconds - self._seconds)
            self._seconds = seconds
        tokens = values.pop(f"{OWN}trained_tokens", None)
        if tokens is not None:
            self._tokens += tokens
            values["num_tokens"] = self._tokens
        return int(row["step"]) + 1, values
